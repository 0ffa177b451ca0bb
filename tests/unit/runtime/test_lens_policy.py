"""Focus by a LensNet: untrained, with keys, and with random weights."""

from __future__ import annotations

import pytest
import torch
from engine_cases import K, config, learned_gistnet, new_engine, words

from megacontext.lensnet import LensNet, LensNetConfig
from megacontext.lensnet.features import FEATURE_NAMES
from megacontext.runtime.focus_policies import AttentionPolicy, LexicalPolicy, entry_attention
from megacontext.runtime.lens_policy import LensPolicy

SECRET = "the zebra sleeps in the blue barn. "


def make_lens(base, *, seed=None, **changes):
    lens = LensNet(
        LensNetConfig(
            d_model=base.d_model, key_width=16, d_hidden=32, n_layers=1, d_ff=32, **changes
        )
    ).eval()
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        for parameter in lens.parameters():
            parameter.data.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return lens.requires_grad_(False)


def told(engine):
    engine.ingest(words(12 * K) + SECRET + words(20 * K, seed=1))
    return engine


def asking(engine, query):
    """What the policy may look at while somebody waits for an answer."""
    return engine.focus.view(query, asking=len(query))


def ranked(blocks, utility):
    order = sorted(zip(utility.tolist(), blocks.tolist(), strict=True), reverse=True)
    return [block for _, block in order]


def test_untrained_it_ranks_by_bm25(base, tmp_path):
    lens = make_lens(base, lexical_prior=1.0)
    engine = told(new_engine(tmp_path, base))
    view = asking(engine, base.encode("where does the zebra sleep"))
    scores = LensPolicy(lens, relative_floor=0.0).score(view).check(view.context)
    blocks, points = LexicalPolicy(proposals=16).search(view)
    best = ranked(scores.proposal_blocks, scores.proposal_utility)[: len(blocks)]
    assert best[:2] == ranked(blocks, points)[:2]
    found = dict(
        zip(scores.proposal_blocks.tolist(), scores.proposal_utility.tolist(), strict=True)
    )
    # What BM25 says, as a share of its best, or what a better neighbour lends.
    for block, share in zip(blocks.tolist(), (points / points.max()).tolist(), strict=True):
        lent = max(found.get(block + 1, 0.0) * 0.5, found.get(block - 1, 0.0) * 0.8)
        assert found[block] == pytest.approx(max(share, lent))
    assert float(scores.proposal_utility.max()) == pytest.approx(1.0)
    assert not scores.entry_utility.any()
    assert not scores.expand_utility.any()
    without = LensPolicy(make_lens(base)).score(view)
    assert not without.proposal_utility.any(), "without the prior it stays calm"


@pytest.mark.parametrize("seed", range(3))
def test_scores_are_legal(base, seed, tmp_path):
    lens = make_lens(base, seed=seed)
    engine = told(new_engine(tmp_path, base, lens=lens))
    engine.focus.context = engine.context.reveal(3).check(budget=False)
    view = asking(engine, base.encode("zebra"))
    scores = LensPolicy(lens).score(view).check(view.context)
    context = view.context
    raw = context.levels == 0
    assert scores.expand_utility.any() or scores.entry_utility.any()
    assert not (scores.expand_utility[raw] != 0).any(), "raw blocks cannot expand"
    assert bool((scores.expand_utility >= 0).all())
    in_tail = context.ends > context.tail_start
    assert not (scores.entry_utility[in_tail] != 0).any(), "the tail stays"
    entries = context.indices_of(scores.proposal_blocks * K)
    assert bool((context.levels[entries] > 0).all()), "what is raw is no proposal"
    assert scores.proposal_blocks.unique().numel() == scores.proposal_blocks.numel()


def test_harm_of_detail_is_said_of_raw_blocks_alone(base, tmp_path):
    """A gist is scored by opening it: if that wins nothing, its siblings need not collapse."""
    lens = make_lens(base)
    lens.entry_head.score.bias.data.fill_(-3.0)
    engine = new_engine(tmp_path, base, policy=LensPolicy(lens), config=config(budget=250))
    engine.ingest(words(40 * K))
    opened = engine.context.expand(0).reveal(3)
    engine.focus.context = opened.check()
    gists = opened.levels > 0
    collapsible = opened.legal_collapse
    assert int((gists & collapsible).sum()) == 0, "a raw block among them"
    whole = engine.context.collapse(3)
    assert int(((whole.levels > 0) & whole.legal_collapse).sum()) == K
    for context in (opened, whole):
        engine.focus.context = context
        view = asking(engine, base.encode("zebra"))
        scores = LensPolicy(lens).score(view).check(context)
        raw = context.levels == 0
        asked = scores.entry_utility < 0
        assert torch.equal(asked, raw & context.legal_collapse)
    engine.focus.context = whole
    assert not engine.refocus("zebra").edits


def test_a_raw_block_that_is_proposed_is_kept(base, tmp_path):
    """Or the next refocus would take back what the last one did."""
    lens = make_lens(base, lexical_prior=1.0)
    engine = told(new_engine(tmp_path, base, policy=LensPolicy(lens)))
    engine.refocus("where does the zebra sleep")
    raw = {s // K for level, s, _ in engine.context.spans().tolist() if level == 0}
    assert raw & {12, 13}
    view = asking(engine, base.encode("where does the zebra sleep"))
    scores = engine.focus.policy.score(view)
    for block in raw & {12, 13}:
        assert float(scores.entry_utility[view.context.index_of(block * K)]) > 0
    for _ in range(4):
        engine.refocus("where does the zebra sleep")
    after = {s // K for level, s, _ in engine.context.spans().tolist() if level == 0}
    assert raw & {12, 13} <= after


def test_keys_propose_blocks(base, tmp_path):
    lens = make_lens(base, seed=1)
    keyed = told(new_engine(tmp_path, base, lens=lens))
    plain = told(new_engine(tmp_path, base, name="b"))
    policy = LensPolicy(lens, proposals=4)
    query = base.encode("qqqq xxxx")  # no word of the history
    assert not len(policy.score(plain.focus.view(query)).proposal_blocks)
    view = keyed.focus.view(query)
    found = policy.inputs(view).blocks.tolist()
    hidden = base.features(query).float()[None]
    queries = lens.encode_queries(hidden, torch.ones(1, len(query), dtype=torch.bool))
    keys = keyed.memory.keys(1, 0, view.n_proposable).float()
    relevance = (queries[0] @ keys.T).amax(dim=0)
    assert sorted(found) == sorted(relevance.topk(4).indices.tolist())


def test_both_indices_together_propose_what_neither_puts_first(base, tmp_path, monkeypatch):
    """Block 5 is third for each index, and the first of all by the sum."""
    lens = make_lens(base)
    policy = LensPolicy(lens, proposals=2)
    view = asking(told(new_engine(tmp_path, base)), base.encode("where does it sleep"))
    found = torch.tensor([1, 2, 5]), torch.tensor([4.0, 3.9, 3.8])
    keyed = torch.tensor([7, 8, 5]), torch.tensor([9.0, 8.9, 8.8])
    monkeypatch.setattr(policy._lexical, "search", lambda _: found)
    monkeypatch.setattr(policy, "_by_keys", lambda *_: keyed)
    inputs = policy.inputs(view)
    # 5 scores .95 - .02 together, 1 and 2 are as far as the farthest key: 1 - .02, .975 - .02.
    assert inputs.blocks.tolist() == [1, 2, 7, 8]
    policy = LensPolicy(lens, proposals=2)
    keyed = torch.tensor([7, 8, 5, 9]), torch.tensor([9.0, 8.9, 8.8, 0.0])
    monkeypatch.setattr(policy._lexical, "search", lambda _: found)
    monkeypatch.setattr(policy, "_by_keys", lambda *_: keyed)
    assert policy.inputs(view).blocks.tolist() == [1, 2, 5, 7, 8]


@pytest.mark.parametrize(("places", "read"), [(1, {5}), (2, {5, 7}), (4, {5, 7, 1, 8})])
def test_both_together_and_keys_take_turns_in_being_read(places, read, base, tmp_path, monkeypatch):
    policy = LensPolicy(make_lens(base, likelihoods=places), reads=None)
    view = asking(told(new_engine(tmp_path, base)), base.encode("where does it sleep"))
    found = torch.tensor([1, 2, 5]), torch.tensor([4.0, 3.9, 3.8])
    keyed = torch.tensor([7, 8, 5, 9]), torch.tensor([9.0, 8.9, 8.8, 0.0])
    monkeypatch.setattr(policy._lexical, "search", lambda _: found)
    monkeypatch.setattr(policy, "_by_keys", lambda *_: keyed)
    inputs = policy.inputs(view)
    known = inputs.cache.features[0, :, FEATURE_NAMES.index("likelihood_known")].bool()
    assert set(inputs.blocks[known].tolist()) == read
    calm = policy.inputs(view.__class__(**{**vars(view), "asked": False}))
    assert not calm.cache.features[0, :, FEATURE_NAMES.index("likelihood_known")].any()


def test_what_one_look_leaves_unread_the_next_one_reads(base, tmp_path, monkeypatch):
    policy = LensPolicy(make_lens(base, likelihoods=5), reads=3, relative_floor=0.0)
    view = asking(told(new_engine(tmp_path, base)), base.encode("where does it sleep"))
    found = torch.tensor([1, 2, 5, 9]), torch.tensor([4.0, 3.9, 3.8, 3.7])
    monkeypatch.setattr(policy._lexical, "search", lambda _: found)
    column = FEATURE_NAMES.index("likelihood_known")

    def read():
        inputs = policy.inputs(view)
        return inputs.blocks[inputs.cache.features[0, :, column].bool()].tolist(), inputs.unread

    # The first look also reads the question by itself, which counts.
    assert read() == ([1, 2], True)
    assert policy.score(view).unread is False, "the second look has read the others"
    assert read() == ([1, 2, 5, 9], False)
    calm = policy.inputs(view.__class__(**{**vars(view), "asked": False}))
    assert calm.unread is False, "while nobody asks nothing is read"


def test_an_answer_waits_until_the_best_proposals_are_read(base, tmp_path, monkeypatch):
    """With a lens that opens nothing, the looks end once all that may be read was read."""
    policy = LensPolicy(make_lens(base, likelihoods=5), reads=2)
    found = torch.tensor([1, 2, 5, 9, 3]), torch.tensor([4.0, 3.9, 3.8, 3.7, 3.6])
    monkeypatch.setattr(policy._lexical, "search", lambda _: found)
    engine = told(new_engine(tmp_path, base, policy=policy))
    question = "where does the zebra sleep"
    # What was read for a question is known when it is asked again.
    for rounds in (3, 1):
        before = engine.focus.state.round
        engine.ask(question, query=question, max_new_tokens=1)
        assert engine.focus.state.round - before == rounds


def test_with_learned_gists_and_through_the_engine(base, tmp_path):
    lens, net = make_lens(base, seed=2), learned_gistnet(base, slots=2)
    engine = told(
        new_engine(
            tmp_path,
            base,
            lens=lens,
            gistnet=net,
            policy=LensPolicy(lens),
            config=config(budget=250),
        )
    )
    assert len(list(engine.generate("zebra? ", max_new_tokens=40, eos_token_id=()))) == 40
    engine.context.check()


def test_no_history(base, tmp_path):
    lens = make_lens(base, seed=1)
    engine = new_engine(tmp_path, base, lens=lens, policy=LensPolicy(lens))
    assert len(list(engine.generate("hello", max_new_tokens=3, remember=False))) == 3
    engine.refocus()


def test_told_of_attention_it_proposes_what_the_base_attends_to(base, tmp_path):
    calm, told_ = (make_lens(base, reads_attention=reads) for reads in (False, True))
    engine = told(new_engine(tmp_path, base))
    engine.focus.context = engine.context.reveal(3).check(budget=False)
    view = engine.focus.view(base.encode("qqqq"), query=base.encode("qqqq"))
    context = view.context
    without, inputs = (LensPolicy(lens, proposals=3).inputs(view) for lens in (calm, told_))
    assert not len(without.blocks), "no word and no key says anything of it"
    column = FEATURE_NAMES.index("attention")
    assert not without.entries.features[0, :, column:].any()
    mass = entry_attention(view, 16)
    # As the attention policy reads it, of every entry.
    points = AttentionPolicy(nats_per_mass=1.0).score(view).entry_utility
    torch.testing.assert_close(mass, points)
    torch.testing.assert_close(inputs.entries.features[0, :, column], mass)
    gists = [(float(mass[i]), i) for i in range(len(context)) if context.levels[i] == 1]
    assert len(gists) > 3
    best = sorted(int(context.starts[i]) // K for _, i in sorted(gists, reverse=True)[:3])
    assert inputs.blocks.tolist() == best
    covering = context.indices_of(inputs.blocks * K)
    torch.testing.assert_close(inputs.cache.features[0, :, column], mass[covering])


def test_what_is_far_below_the_best_is_not_asked_for(base, tmp_path):
    lens = make_lens(base, lexical_prior=1.0)
    engine = told(new_engine(tmp_path, base))
    view = asking(engine, base.encode("where does the zebra sleep"))
    every, some, best = (
        LensPolicy(lens, relative_floor=floor, neighbour_share=(0.0, 0.0))
        .score(view)
        .proposal_utility
        for floor in (0.0, 0.7, 1.0)
    )
    assert 0 < (every < 0.7).sum() < len(every)
    assert torch.equal(some, every.masked_fill(every < 0.7 * every.max(), 0.0))
    assert best.count_nonzero() == (every == every.max()).sum()


def test_neighbours_of_what_is_asked_for_are_asked_for_as_well(base, tmp_path):
    lens = make_lens(base, lexical_prior=1.0)
    engine = told(new_engine(tmp_path, base))
    view = asking(engine, base.encode("where does the zebra sleep"))
    alone, lent = (
        LensPolicy(lens, relative_floor=0.0, neighbour_share=share).score(view)
        for share in ((0.0, 0.0), (0.25, 0.75))
    )
    before = dict(zip(alone.proposal_blocks.tolist(), alone.proposal_utility.tolist(), strict=True))
    after = dict(zip(lent.proposal_blocks.tolist(), lent.proposal_utility.tolist(), strict=True))
    assert set(before) == set(after)
    for block, utility in after.items():
        shares = (before[block], before.get(block + 1, 0.0) / 4, before.get(block - 1, 0.0) * 0.75)
        assert utility == pytest.approx(max(shares))
    assert after != before


def test_gists_far_below_the_best_proposal_are_not_opened(base, tmp_path):
    lens = make_lens(base, seed=2, lexical_prior=8.0)
    engine = told(new_engine(tmp_path, base, lens=lens))
    engine.focus.context = engine.context.reveal(3).check(budget=False)
    view = asking(engine, base.encode("where does the zebra sleep"))
    free = LensPolicy(lens, relative_floor=0.0).score(view)
    wanted, best = free.expand_utility, float(free.proposal_utility.max())
    floor = float(wanted[wanted > 0].median()) / best
    held = LensPolicy(lens, relative_floor=floor).score(view).expand_utility
    assert 0 < held.count_nonzero() < wanted.count_nonzero()
    assert torch.equal(held, wanted.masked_fill(wanted < floor * best, 0.0))


def test_a_further_look_searches_only_for_what_is_new(base, tmp_path, monkeypatch):
    lens = make_lens(base, seed=1)
    engine = told(new_engine(tmp_path, base, lens=lens))
    policy, searched = LensPolicy(lens), []
    features = type(base).features

    def watched(self, ids):
        searched.append(len(ids))
        return features(self, ids)

    monkeypatch.setattr(type(base), "features", watched)
    query = base.encode("where does the zebra sleep")
    for again in (query, query.clone()):
        view = asking(engine, again)
        scores, alone = policy.score(view), LensPolicy(lens).score(view)
        for name in ("proposal_blocks", "proposal_utility", "entry_utility", "expand_utility"):
            assert torch.equal(getattr(scores, name), getattr(alone, name)), name
        engine.focus.context = engine.context.reveal(3)
    assert len(searched) == 3, "once for this policy, and once for each that looks first"
    policy.score(asking(engine, query[1:]))
    assert searched[3:] == [len(query) - 1]
    engine.ingest(words(2 * K))
    policy.score(asking(engine, query[1:]))
    assert len(searched) == 5, "there may be something new to find"


def test_while_nobody_asks_it_is_calm(base, tmp_path):
    lens = make_lens(base, seed=2, lexical_prior=3.0)
    lens.entry_head.score.bias.data.sub_(9.0)
    engine = told(new_engine(tmp_path, base, lens=lens))
    engine.focus.context = engine.context.reveal(3).check(budget=False)
    query = base.encode("where does the zebra sleep")
    policy = LensPolicy(lens, relative_floor=0.0, calm_nats=2.0)
    asked = policy.score(asking(engine, query))
    calm = policy.score(engine.focus.view(query)).check(engine.context)
    worth = asked.proposal_utility
    assert 0 < int((worth >= 2.0).sum()) < len(worth)
    assert torch.equal(calm.proposal_utility, worth.masked_fill(worth < 2.0, 0.0))
    assert bool((asked.entry_utility < 0).any()), "what it would rather not see"
    assert torch.equal(calm.entry_utility, asked.entry_utility.clamp(min=0.0))
    nothing = LensPolicy(lens).score(engine.focus.view(query)).check(engine.context)
    assert not len(nothing.proposal_blocks)
    assert not nothing.entry_utility.any()
    assert not nothing.expand_utility.any()
