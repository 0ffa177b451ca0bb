"""How much likelier a block makes a question, beside a plain forward for each."""

from __future__ import annotations

import pytest
import torch
from engine_cases import K, new_engine, words

from megacontext.errors import ConfigError
from megacontext.lensnet import FEATURE_NAMES, LensNet, LensNetConfig
from megacontext.runtime.lens_policy import LensPolicy
from megacontext.runtime.query_likelihood import QueryLikelihood

SECRET = "the zebra sleeps in the blue barn. "
QUESTION = "where does the zebra sleep"


@pytest.fixture
def engine(base, tmp_path):
    engine = new_engine(tmp_path, base)
    engine.ingest(words(12 * K) + SECRET + words(20 * K, seed=1))
    return engine


@pytest.fixture
def read(base, monkeypatch):
    """How many blocks the base read in each forward."""
    counts, whole = [], base.nll_batch

    def counted(contexts, *more):
        counts.append(len(contexts))
        return whole(contexts, *more)

    monkeypatch.setattr(base, "nll_batch", counted)
    return counts


def plain(base, ids, n_text):
    """Log-likelihood of the last ``n_text - 1`` tokens, by the model as transformers runs it."""
    with torch.no_grad():
        logits = base.model(input_ids=ids[None]).logits[0].float().log_softmax(-1)
    wanted = range(len(ids) - n_text + 1, len(ids))
    return sum(float(logits[place - 1, ids[place]]) for place in wanted)


@pytest.mark.parametrize("margin", [0, 3])
def test_gains_are_those_of_plain_forwards(base, engine, margin):
    view = engine.focus.view(base.encode(QUESTION))
    text = view.pending
    blocks = torch.tensor([12, 5, 0, engine.context.cursor // K - 1])
    gains = QueryLikelihood(margin=margin).gains(view, blocks)
    tokens = engine.memory.tokens(0, engine.context.cursor).long()
    n = K + 2 * margin
    for block, gain in zip(blocks.tolist(), gains.tolist(), strict=True):
        start = min(max(0, block * K - margin), len(tokens) - n)
        behind = plain(base, torch.cat((tokens[start : start + n], text)), len(text))
        assert gain == pytest.approx(behind - plain(base, text, len(text)), abs=1e-3)


def test_it_reads_a_block_once_for_a_question(base, engine, read):
    view = engine.focus.view(base.encode(QUESTION))
    likelihood = QueryLikelihood()
    first = likelihood.gains(view, torch.tensor([1, 2, 3]))
    again = likelihood.gains(view, torch.tensor([3, 1, 4]))
    assert read == [3, 1]
    assert again[:2].tolist() == first[[2, 0]].tolist()
    other = engine.focus.view(base.encode(QUESTION + " now"))
    assert not torch.equal(likelihood.gains(other, torch.tensor([1])), first[:1])
    assert read[2:] == [1]


def test_a_look_reads_few_texts_and_the_next_one_goes_on(base, engine, read):
    view = engine.focus.view(base.encode(QUESTION))
    blocks = torch.tensor([12, 5, 0, 7, 3, 9, 20, 1])
    every = QueryLikelihood().gains(view, blocks)
    likelihood = QueryLikelihood(most_reads=4)
    read.clear()
    for known in (3, 7, 8, 8):
        gains = likelihood.gains(view, blocks)
        assert gains[known:].isnan().all()
        torch.testing.assert_close(gains[:known], every[:known])
    assert read == [3, 4, 1]
    # Another order asks for other blocks first; what is known stays known.
    likelihood = QueryLikelihood(most_reads=2)
    first = likelihood.gains(view, blocks.flip(0))
    assert (~first.isnan()).nonzero().flatten().tolist() == [0]
    second = likelihood.gains(view, blocks)
    assert (~second.isnan()).nonzero().flatten().tolist() == [0, 1, 7]


@pytest.mark.parametrize("reads", [1, 0, -3])
def test_a_look_that_reads_nothing_is_refused(reads):
    with pytest.raises(ConfigError, match=f"a look reads {reads} texts at most; 2 or more"):
        QueryLikelihood(most_reads=reads)


@pytest.mark.parametrize("query", [QUESTION, "the zebra"])
def test_features_of_the_query_are_read_along_with_the_text(base, engine, monkeypatch, query):
    view = engine.focus.view(base.encode(QUESTION), query=base.encode(query))
    blocks, likelihood, forwards = torch.tensor([12, 5]), QueryLikelihood(), []
    whole = base.forward_rows

    def counted(embeddings, *more):
        forwards.append(len(embeddings))
        return whole(embeddings, *more)

    wanted, gains = base.features(view.query), likelihood.gains(view, blocks)
    likelihood = QueryLikelihood()
    monkeypatch.setattr(base, "forward_rows", counted)
    torch.testing.assert_close(likelihood.features(view), wanted)
    torch.testing.assert_close(likelihood.gains(view, blocks), gains)
    assert forwards == [1 if query == QUESTION else 2, 2]
    # By then the text by itself is known.
    torch.testing.assert_close(likelihood.features(view), wanted)
    assert len(forwards) == 2


def test_the_newest_tokens_of_a_long_text_count(base, engine):
    view = engine.focus.view(base.encode(QUESTION))
    blocks = torch.tensor([12, 5])
    short = engine.focus.view(view.pending[-4:])
    assert torch.equal(
        QueryLikelihood(most_tokens=4).gains(view, blocks), QueryLikelihood().gains(short, blocks)
    )
    assert not QueryLikelihood(most_tokens=1).gains(view, blocks).any(), "nothing left to expect"


def test_the_lens_is_told_of_the_best_proposals_where_somebody_asks(base, engine):
    def inputs(likelihoods, **asking):
        lens = LensNet(
            LensNetConfig(
                d_model=base.d_model, key_width=16, d_hidden=32, n_layers=1, d_ff=32,
                likelihoods=likelihoods,
            )
        ).eval()  # fmt: skip
        policy = LensPolicy(lens.requires_grad_(False))
        return policy.inputs(engine.focus.view(base.encode(QUESTION), **asking))

    known = FEATURE_NAMES.index("likelihood_known")
    query = base.encode(QUESTION)
    asked, unasked, without = inputs(2, query=query), inputs(2), inputs(0, query=query)
    assert len(asked.blocks) > 2
    told = asked.cache.features[0, :, known].bool()
    assert int(told.sum()) == 2
    points = asked.cache.features[0, :, FEATURE_NAMES.index("lexical")]
    assert set(points.topk(2).indices.tolist()) == set(told.nonzero()[:, 0].tolist())
    view = engine.focus.view(base.encode(QUESTION), query=query)
    gains = QueryLikelihood().gains(view, asked.blocks[told])
    column = asked.cache.features[0, told, FEATURE_NAMES.index("likelihood")]
    torch.testing.assert_close(column, gains / 10)
    for other in (unasked, without):
        assert not other.cache.features[0, :, known].any()


def test_of_an_answer_in_the_making_what_was_written_is_expected(base, engine):
    prompt, note = base.encode(QUESTION), base.encode(" in the barn")
    pending = torch.cat((prompt, note))
    blocks = torch.tensor([12, 5])
    writing = engine.focus.view(pending, query=prompt, written=len(note))
    alone = engine.focus.view(note, query=prompt)
    likelihood = QueryLikelihood()
    found = likelihood.gains(writing, blocks)
    assert torch.equal(found, QueryLikelihood().gains(alone, blocks))
    assert not torch.equal(found, likelihood.gains(engine.focus.view(pending), blocks))


def test_told_is_what_was_raw_when_the_text_was_new(base, engine):
    likelihood, blocks = QueryLikelihood(), torch.tensor([5, 12])

    def told(written):
        view = engine.focus.view(base.encode(QUESTION + written), query=base.encode(QUESTION))
        return likelihood.told(view, blocks).tolist()

    assert told("") == [False, False]
    engine.focus.context = engine.context.reveal(12).check(budget=False)
    assert told("") == [False, False], "it was found in answer to this very text"
    assert told(" it") == [False, True]
