from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_base_model

from megacontext.errors import InputError
from megacontext.evaluation.gist_answers import _gists, answer_all, single_fact_questions
from megacontext.evaluation.substitution import HORIZON, Substitution, measure
from megacontext.gistnet import GistNet, GistNetConfig
from megacontext.runtime.base_model import BaseModel
from megacontext.runtime.context_input import ContextInput
from megacontext.runtime.gist_features import GistFeatures

SIZE = 32
PROSE = "The old king sat by the fire. Nobody spoke a word. " * 200


@pytest.fixture(scope="module")
def base():
    return tiny_base_model("qwen3", max_positions=512)


def net(base, reader="kv", slots=2, feature_layers=0):
    torch.manual_seed(1)
    made = GistNet(
        GistNetConfig(
            kind="transformer",
            d_model=base.d_model,
            n_heads=2,
            context_tokens=SIZE,
            block_size=SIZE,
            reader=reader,
            slots=slots,
            kv_layers=base.n_layers,
            kv_heads=base.n_kv_heads,
            kv_head_dim=base.head_dim,
            feature_layers=feature_layers,
            feature_segment=2 * SIZE,
        )
    )
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return made.eval()


def windows(base, shape, count=3):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(base.vocab_size, (count, shape.tokens(SIZE)), generator=generator)


def nll_of(base, context, ids, first):
    return base.nll(context, ids[first + 1 : first + 1 + HORIZON])


def raw(base, ids):
    return ContextInput(base.embed(ids), torch.arange(len(ids)))


@pytest.mark.parametrize("feature_layers", [0, 2])
@pytest.mark.parametrize("reader", ["kv", "embedding"])
def test_every_variant_is_what_the_model_says_of_a_context_made_by_hand(
    base, reader, feature_layers
):
    shape = Substitution("one in the middle", (0, 1, 0))
    ids, gistnet = windows(base, shape), net(base, reader, feature_layers=feature_layers)
    measured = measure(base, gistnet, ids, shape, batch=2)
    for row, window in enumerate(ids):
        # The token right behind the context is read by every variant.
        full = nll_of(base, raw(base, window[: 3 * SIZE + 1]), window, 3 * SIZE)
        kept = torch.cat((window[:SIZE], window[2 * SIZE : 3 * SIZE + 1]))
        dropped = nll_of(base, raw(base, kept), window, 3 * SIZE)
        newest = window[3 * SIZE - (2 * SIZE + gistnet.cost) : 3 * SIZE + 1]
        recency = nll_of(base, raw(base, newest), window, 3 * SIZE)
        gist = nll_of(base, by_hand(base, gistnet, window), window, 3 * SIZE)
        for name, expected in zip(
            ("full", "dropped", "recency", "gist"), (full, dropped, recency, gist), strict=True
        ):
            torch.testing.assert_close(measured.nll[name][row], expected, atol=1e-4, rtol=1e-4)
    assert measured.cost.shape == (3, HORIZON)
    assert bool((measured.cost > -1e-5).all())
    assert float(measured.cost.mean()) > 0


def by_hand(base, gistnet, window):
    """One raw block, one gist, one raw block and the token behind them."""
    read = GistFeatures(base, gistnet.config).of(window[: 2 * SIZE])
    made = gistnet.encode_level(read, 1).vectors[1:]
    level = torch.ones(1, dtype=torch.int64)
    gist_positions = SIZE + torch.arange(gistnet.cost)
    rows = base.embed(torch.cat((window[:SIZE], window[2 * SIZE : 3 * SIZE + 1])))
    behind = SIZE + gistnet.cost
    positions = torch.cat((torch.arange(SIZE), torch.arange(behind, behind + SIZE + 1)))
    if gistnet.config.reader == "kv":
        keys, values = gistnet.read_kv(made, level)
        return ContextInput(
            rows, positions, keys.flatten(1, 2), values.flatten(1, 2), gist_positions
        )
    entries = gistnet.read_embeddings(made, level)[0]
    joined = torch.cat((rows[:SIZE], entries, rows[SIZE:]))
    return ContextInput(joined, torch.arange(len(joined)))


def test_the_mean_gist_is_that_of_an_untrained_net(base):
    shape = Substitution("two", (0, 1, 1))
    ids = windows(base, shape)
    plain = measure(base, GistNet.untrained(base.d_model), ids, shape)
    other = measure(base, net(base), ids, shape)
    torch.testing.assert_close(plain.nll["gist"], other.nll["mean"])
    torch.testing.assert_close(plain.nll["full"], other.nll["full"])


def test_only_what_is_asked_for_is_measured(base):
    shape = Substitution("one", (0, 1))
    measured = measure(base, net(base), windows(base, shape), shape, variants=("dropped",))
    assert list(measured.nll) == ["full", "gist", "dropped"]


def test_windows_of_another_length_are_refused(base):
    shape = Substitution("one", (0, 1))
    with pytest.raises(InputError, match=r"expected \[n, 224\]"):
        measure(base, net(base), windows(base, shape)[:, :-1], shape)


def test_facts_lie_wholly_in_the_blocks_that_become_gists(base):
    questions = single_fact_questions(base, PROSE, 5, blocks=16, block_size=SIZE, seed=1)
    again = single_fact_questions(base, PROSE, 5, blocks=16, block_size=SIZE, seed=1)
    assert [q.question for q in questions] == [q.question for q in again]
    for question in questions:
        assert len(question.context) == 16 * SIZE
        assert question.answer in base.decode(question.context)


@torch.no_grad()
@pytest.mark.parametrize("feature_layers", [0, 2])
def test_questions_are_asked_behind_the_gists_of_the_text(base, feature_layers):
    gistnet, ids = net(base, feature_layers=feature_layers), windows(base, Substitution("", (0,)))
    made = gistnet.encode_level(GistFeatures(base, gistnet.config).of(ids[0]), 1).vectors
    keys, _ = gistnet.read_kv(made, torch.ones(len(made), dtype=torch.int64))
    context = _gists(base, gistnet, ids[0])
    torch.testing.assert_close(context.gist_keys, keys.flatten(1, 2))
    assert context.gist_positions.tolist() == list(range(6 * gistnet.cost))


def test_the_bundled_model_answers_from_the_text_but_not_without_it():
    base = BaseModel.from_pretrained("bundled:tiny")
    questions = single_fact_questions(base, PROSE, 12, blocks=8, block_size=SIZE, seed=2)
    right = answer_all(base, GistNet.untrained(base.d_model), questions)
    assert sum(right["full"]) >= 7
    assert sum(right["no_evidence"]) <= 2
    # Means of embeddings hold no exact facts.
    assert sum(right["gist"]) < sum(right["full"])
