from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_base_model

from megacontext.errors import InputError
from megacontext.evaluation.in_window import accuracy, answers_exactly

PROMPT = "Where is it?\nAnswer:"


@pytest.fixture(scope="module")
def base():
    return tiny_base_model("qwen3")


@pytest.fixture
def trained(base):
    """The tiny model with a head that writes one fixed text after the prompt."""

    def teach(text):
        ids = torch.cat([base.encode(PROMPT), base.encode(text)])
        taught = tiny_base_model("gpt2")
        embedding = taught.model.get_input_embeddings().weight
        taught.model.set_output_embeddings(torch.nn.Linear(*embedding.shape[::-1], bias=False))
        hidden = taught.features(ids)[:-1]
        wanted = torch.nn.functional.one_hot(ids[1:], embedding.shape[0]).float()
        solved = torch.linalg.lstsq(hidden.double(), wanted.double()).solution
        taught.model.get_output_embeddings().weight = torch.nn.Parameter(
            solved.T.float(), requires_grad=False
        )
        return taught

    return teach


def decoded(base, prompt, count):
    """What the model itself writes, token after token, without a cache."""
    ids = base.encode(prompt)
    for _ in range(count):
        ids = torch.cat([ids, base.model(input_ids=ids[None]).logits[0, -1].argmax()[None]])
    return ids[-count:]


@pytest.mark.parametrize("text", [" barn\n", " a\n", " 417\n"])
def test_the_answer_that_greedy_decoding_writes_is_the_only_right_one(trained, text):
    base = trained(text)
    target = base.encode(text)
    assert torch.equal(decoded(base, PROMPT, len(target)), target)
    answer = text.strip()
    assert answers_exactly(base, PROMPT, answer)
    for wrong in (answer[:-1], answer + "s", answer.upper() + "x", "z" + answer[1:]):
        assert not answers_exactly(base, PROMPT, wrong)
    assert accuracy(base, [(PROMPT, answer), (PROMPT, answer + "s")]) == [True, False]


def test_notes_before_the_answer_are_no_part_of_it(trained):
    base = trained(" Ann has it. So: barn\n")
    assert answers_exactly(base, PROMPT, "barn")
    assert not answers_exactly(base, PROMPT, "bar")
    assert not answers_exactly(base, PROMPT, "Ann has it.")


@pytest.mark.parametrize("seed", range(2))
def test_it_agrees_with_a_greedy_decode_of_a_random_model(seed):
    base = tiny_base_model("qwen3", seed)
    for prompt in ("a", "Who is it?", PROMPT):
        for answer in ("x", "the barn", "7"):
            target = base.encode(f" {answer}\n")
            right = torch.equal(decoded(base, prompt, len(target)), target)
            assert answers_exactly(base, prompt, answer) == right


def test_an_empty_prompt_is_refused(base):
    with pytest.raises(InputError, match="prompt is empty"):
        answers_exactly(base, "", "x")
