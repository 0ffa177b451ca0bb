from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_base_model

from megacontext.errors import InputError
from megacontext.evaluation.baselines import SlidingWindow
from megacontext.memory import Memory, MemoryIdentity

TEXT = "The cat sat on the mat. It was a very old cat, and a wise one."


@pytest.fixture(scope="module")
def base():
    return tiny_base_model("qwen3")


@pytest.fixture
def memory(base, tmp_path):
    identity = MemoryIdentity("tiny", base.tokenizer_hash, "none", 64, 1, 0, "fp16")
    with Memory.create(tmp_path / "m.mctx", identity) as memory:
        memory.append(base.encode(TEXT), {}, {})
        yield memory


def plain_nll(base, ids, n_targets):
    """The model's own NLL of the last tokens, without MegaContext."""
    logits = base.model(input_ids=ids[None]).logits[0, :-1].float()
    nll = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
    return nll[-n_targets:]


@pytest.mark.parametrize("cursor", [5, 20, 40, 62])
def test_the_context_is_the_newest_tokens_and_the_prompt(base, memory, cursor):
    ids = base.encode(TEXT)
    pending = base.encode("Who?")
    context = SlidingWindow(base, memory, 24).context(cursor, pending, 5)
    kept = ids[max(0, cursor - 15) : cursor]
    torch.testing.assert_close(context.embeddings, base.embed(torch.cat([kept, pending])))
    assert context.positions.tolist() == list(range(len(kept) + 4))
    assert context.n_gists == 0


@pytest.mark.parametrize("budget", [12, 30, 100])
def test_nll_is_that_of_the_plain_model_on_these_tokens(base, memory, budget):
    ids = base.encode(TEXT)
    cursor, targets = 45, ids[45:53]
    found = SlidingWindow(base, memory, budget).nll(cursor, targets)
    window = ids[max(0, cursor - (budget - 8)) : 53]
    torch.testing.assert_close(found, plain_nll(base, window, 8), rtol=1e-4, atol=1e-4)


def test_older_tokens_count_only_in_a_larger_window(base, memory):
    targets = base.encode(TEXT)[45:53]
    small, large = (SlidingWindow(base, memory, b).nll(45, targets) for b in (12, 30))
    assert not torch.allclose(small, large, atol=1e-2)


def test_the_answer_is_the_greedy_continuation_of_the_window(base, memory):
    window = SlidingWindow(base, memory, 32)
    answer = window.answer("So: ", "So?", max_new_tokens=6, stop="\0")
    ids = torch.cat([base.encode(TEXT)[-22:], base.encode("So: ")])
    for _ in range(6):
        token = base.model(input_ids=ids[None]).logits[0, -1].argmax()
        ids = torch.cat([ids, token[None]])
    assert answer == base.decode(ids[-6:])
    cut = window.answer("So: ", "So?", max_new_tokens=6, stop=answer[3])
    assert cut == answer[: answer.index(answer[3])]


def test_a_prompt_that_fills_the_budget_is_refused(base, memory):
    window = SlidingWindow(base, memory, 10)
    assert window.context(20, torch.arange(6), 4).n_rows == 6
    with pytest.raises(InputError, match="prompt of 7 tokens and 4 to come do not fit into 10"):
        window.context(20, torch.arange(7), 4)
