"""What the policies that need no training ask for."""

from __future__ import annotations

import pytest
import torch
from engine_cases import K, config, learned_gistnet, new_engine, words

from megacontext.runtime.focus_policies import (
    AttentionPolicy,
    FocusView,
    LexicalPolicy,
    RecencyPolicy,
    proposals_to_scores,
)

SECRET = "the zebra sleeps in the blue barn. "
NOTHING = torch.empty(0, dtype=torch.int64)


def asked(engine, query):
    return engine.focus.view(engine.base.encode(query))


def proposals(policy, view):
    scores = policy.score(view).check(view.context)
    return dict(zip(scores.proposal_blocks.tolist(), scores.proposal_utility.tolist(), strict=True))


def test_recency_asks_for_nothing(base, tmp_path):
    engine = new_engine(tmp_path, base)
    engine.ingest(words(500))
    scores = RecencyPolicy().score(asked(engine, "amber"))
    assert not len(scores.proposal_blocks)
    assert not scores.entry_utility.any()
    assert not scores.expand_utility.any()


@pytest.mark.parametrize("offset", [12 * K + 2, 12 * K - 10, 12 * K - 20])
def test_a_planted_sentence_is_found_on_both_sides_of_a_border(base, offset, tmp_path):
    engine = new_engine(tmp_path, base)
    engine.ingest(words(offset) + SECRET + words(500, seed=1))
    found = proposals(LexicalPolicy(), asked(engine, "where does the zebra sleep"))
    blocks = set(range(offset // K, (offset + len(SECRET) - 2) // K + 1))
    assert blocks <= set(found)
    assert max(found, key=found.__getitem__) in blocks
    assert set(found) <= set(range(min(blocks) - 1, max(blocks) + 2))


def test_neighbours_get_their_share(base, tmp_path):
    engine = new_engine(tmp_path, base)
    engine.ingest(words(5 * K) + " zebra " + words(20 * K, seed=1))
    _, (points,) = engine.memory.search_blocks("zebra", 5)
    found = proposals(LexicalPolicy(nats_per_point=0.5), asked(engine, "zebra"))
    best = 0.5 * float(points)
    assert found == pytest.approx({5: best, 4: 0.5 * best, 6: 0.8 * best})


def test_nothing_at_or_behind_the_raw_tail(base, tmp_path):
    engine = new_engine(tmp_path, base, config=config(tail_tokens=64))
    engine.ingest("zebra! " * 60)
    raw = engine.context.raw_start // K
    view = asked(engine, "zebra")
    found = proposals(LexicalPolicy(proposals=50), view)
    assert found
    assert max(found) < raw
    assert view.n_proposable == raw
    # Nor behind the cursor, where a stream has committed more than it has read.
    for record in engine.stream("zebra! " * 200):
        assert all(block < record.cursor // K for block, _ in record.proposals)
        spans = record.spans.tolist()
        held = {start // K for level, start, _ in spans if level == 0}
        assert engine.config.tail_tokens // K <= len(held)


def test_history_that_asks_does_not_find_itself(base, tmp_path):
    """Without a prompt the newest tokens ask, and with a short tail they lie in old blocks."""
    settings = config(tail_tokens=0, query_tokens=96)
    engine = new_engine(tmp_path, base, config=settings)
    text = words(8 * K) + SECRET.ljust(2 * K) + words(8 * K, seed=1) + SECRET.ljust(2 * K)
    engine.ingest(text)
    found = proposals(LexicalPolicy(), engine.focus.view(NOTHING))
    assert {8, 9} & set(found)
    first = (len(text) - 96) // K
    assert all(block < first + 1 for block in found), "its neighbour at most"


def test_no_match_no_proposal(base, tmp_path):
    engine = new_engine(tmp_path, base)
    assert not proposals(LexicalPolicy(), asked(engine, "zebra")), "empty memory"
    engine.ingest(words(500))
    assert not proposals(LexicalPolicy(), asked(engine, "zebra"))
    assert not proposals(LexicalPolicy(), asked(engine, "!?"))


def test_what_is_raw_already_is_kept_instead(base, tmp_path):
    engine = new_engine(tmp_path, base)
    engine.ingest(words(500))
    context = engine.context.reveal(3)
    blocks, utility = torch.tensor([3, 4, 3]), torch.tensor([0.5, 0.25, 0.75])
    scores = proposals_to_scores(context, blocks, utility)
    assert scores.proposal_blocks.tolist() == [4]
    assert scores.proposal_utility.tolist() == [0.25]
    kept = torch.zeros(len(context))
    kept[context.index_of(3 * K)] = 0.75
    assert torch.equal(scores.entry_utility, kept)


@pytest.mark.parametrize(("reader", "slots"), [("embedding", 1), ("kv", 3)])
def test_attention_is_summed_per_entry(base, reader, slots, tmp_path):
    net = learned_gistnet(base, reader=reader, slots=slots)
    engine = new_engine(tmp_path, base, gistnet=net)
    engine.ingest(words(700))
    view = asked(engine, "so what? ")
    scores = AttentionPolicy(nats_per_mass=2.0, query_rows=4).score(view).check(view.context)
    mass = base.attention_to(engine.reader.read(view.context, view.pending), 4)
    gists = list(mass[: slots * int((view.context.levels > 0).sum())]) if reader == "kv" else None
    rows = list(mass[len(gists) :] if gists else mass)
    expected = []
    for level, start, end in view.context.spans().tolist():
        source, count = (rows, end - start) if level == 0 else (gists or rows, net.cost)
        expected.append(2.0 * float(sum(source.pop(0) for _ in range(count))))
    assert scores.entry_utility.tolist() == pytest.approx(expected, abs=1e-6)
    assert len(rows) == len(view.pending)
    total = float(scores.entry_utility.sum() / 2 + sum(rows))
    assert total == pytest.approx(1.0, abs=1e-5)
    gist = view.context.levels > 0
    assert torch.equal(scores.expand_utility[gist], scores.entry_utility[gist])
    assert not scores.expand_utility[~gist].any()
    assert not len(scores.proposal_blocks)


def test_attention_over_nothing(base, tmp_path):
    engine = new_engine(tmp_path, base)
    scores = AttentionPolicy().score(asked(engine, "hello"))
    assert not len(scores.entry_utility)


def test_the_view_asks_with_the_newest_tokens(base, tmp_path):
    engine = new_engine(tmp_path, base, config=config(query_tokens=8))
    engine.ingest("0123456789abcdef")

    def query(pending, asking=0):
        view = engine.focus.view(base.encode(pending), asking)
        assert isinstance(view, FocusView)
        return base.decode(view.query)

    assert query("") == "89abcdef"
    assert query("why") == "why"
    assert query("why not now") == " not now"
    assert query("", 3) == "def"
    assert query("why", 5) == "efwhy"
    assert query("why", 99) == "bcdefwhy"
    assert query("why", 2) == "hy"
