"""The stage of keys and queries, against plain loops and against the keys that a memory stores."""

from __future__ import annotations

import math

import pytest
import torch
from engine_cases import config, learned_gistnet, new_engine
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import VOCAB_SIZE, tiny_base_model
from tiny_training import corpus_documents

from megacontext.gistnet import GistNet
from megacontext.lensnet import LensNet, LensNetConfig
from megacontext.tasks.recall_documents import Prose
from megacontext.training.lens_keys import (
    KeyBatch,
    KeyRows,
    KeyStageConfig,
    contrastive_loss,
    key_batch,
    key_batches,
    recall_at,
    relevances,
    weigh_by_rarity,
)
from megacontext.training.lens_texts import Ask, AskedText, LensTexts

K = 32
SMALL = KeyStageConfig(steps=6, texts=2, tokens=192, facts=3, query_tokens=48)


BASE = tiny_base_model(max_positions=256)
TEXTS = LensTexts(BASE.tokenizer.backend_tokenizer, Prose(corpus_documents()))


@pytest.fixture
def base():
    return BASE


@pytest.fixture
def texts():
    return TEXTS


def make_lens(base, *, tokens=True, gist_width=None, **changes):
    return LensNet(
        LensNetConfig(
            d_model=base.d_model, gist_width=gist_width or base.d_model, key_width=16,
            n_queries=2, d_hidden=16, n_heads=2, d_ff=16,
            key_vocabulary=VOCAB_SIZE if tokens else 0, **changes,
        )
    )  # fmt: skip


def look(question, evidence, related=(), noted=""):
    return Ask("kind", question, noted, " x\n", tuple(evidence), tuple(related))


def batch_of(evidence, candidates):
    evidence, candidates = torch.tensor(evidence).bool(), torch.tensor(candidates).bool()
    nothing = torch.zeros(len(evidence), 1)
    return KeyBatch((), nothing.long(), nothing.bool(), evidence, candidates, ())


# Batches


def test_a_batch_of_two_texts(base):
    # Three whole blocks and half a one; two whole blocks.
    first = AskedText(
        torch.arange(3 * K + 16) % 200,
        (
            look("first?", [1]),
            look("second?", [0, 2], related=[1, 3]),
            look("nobody knows?", []),
            look("not yet a block?", [2, 3]),
        ),
        told=(0, 1, 2, 3),
    )
    second = AskedText(torch.arange(2 * K) % 100, (look("why?", [0], noted=" So."),), told=(0,))
    batch = key_batch([first, second], base, block_size=K, query_tokens=7)
    assert [len(tokens) for tokens in batch.texts] == [3 * K, 2 * K]
    assert torch.equal(batch.texts[0], first.tokens[: 3 * K])
    assert batch.families == ("kind",) * 3
    # Blocks 0 to 2 are those of the first text, 3 and 4 those of the second.
    assert batch.evidence.int().tolist() == [[0, 1, 0, 0, 0], [1, 0, 1, 0, 0], [0, 0, 0, 1, 0]]
    # Of another text only noise surely is no evidence; of the own one all but what is related.
    assert batch.candidates.int().tolist() == [[1, 1, 1, 0, 1], [1, 0, 1, 0, 1], [0, 0, 0, 1, 1]]
    asked = [base.encode(query)[-7:].tolist() for query in ("first?", "second?", "why? So.")]
    longest = max(map(len, asked))
    for row, tokens in enumerate(asked):
        missing = longest - len(tokens)
        assert batch.queries[row].tolist() == [0] * missing + tokens
        assert batch.mask[row].tolist() == [False] * missing + [True] * len(tokens)
    assert longest == 7


@given(st.integers(0, 500), st.integers(1, 3))
def test_candidates_as_told_one_by_one(number, count):
    drawn = [TEXTS.draw(number + i, 64, 3) for i in range(count)]
    batch = key_batch(drawn, BASE, block_size=K, query_tokens=64)
    rows = [
        (place, ask)
        for place, text in enumerate(drawn)
        for ask in text.asks
        if ask.evidence and max(ask.evidence) < len(text.tokens) // K
    ]
    columns = [(p, b) for p, text in enumerate(drawn) for b in range(len(text.tokens) // K)]
    assert tuple(batch.evidence.shape) == (len(rows), len(columns))
    evidence, candidates = batch.evidence.tolist(), batch.candidates.tolist()
    for row, (own, ask) in enumerate(rows):
        for column, (place, block) in enumerate(columns):
            needed = place == own and block in ask.evidence
            if place == own:
                candidate = needed or block not in ask.related
            else:
                candidate = block not in drawn[place].told
            assert evidence[row][column] == needed
            assert candidates[row][column] == candidate


def same(first, second):
    return all(
        torch.equal(getattr(first, name), getattr(second, name))
        for name in ("queries", "mask", "evidence", "candidates")
    ) and all(torch.equal(a, b) for a, b in zip(first.texts, second.texts, strict=True))


def test_the_batch_of_a_step_depends_on_seed_and_step_alone(base, texts):
    rows = KeyRows(texts, base, SMALL)
    assert len(rows) == 6
    resumed = KeyRows(texts, base, SMALL, first=4)
    assert len(resumed) == 2
    for index in (0, 1):
        assert same(resumed[index], rows[4 + index])
        assert not same(rows[index], rows[index + 1])
    other = LensTexts(base.tokenizer.backend_tokenizer, texts.prose, seed=1)
    assert not same(KeyRows(other, base, SMALL)[0], rows[0])
    assert len(KeyRows(texts, base, SMALL, first=9)) == 0


def test_a_worker_builds_the_same_batches_in_order(base, texts):
    alone, worked = (
        list(key_batches(KeyRows(texts, base, SMALL, first=3), workers)) for workers in (0, 1)
    )
    assert len(alone) == len(worked) == 3
    assert all(same(a, b) for a, b in zip(alone, worked, strict=True))
    assert [batch.families for batch in alone] == [batch.families for batch in worked]


def test_further_noise_is_a_candidate_of_every_look(base, texts):
    sizes = SMALL.model_copy(update={"noise": 16 * K})
    plain, noisy = (KeyRows(texts, base, config)[2] for config in (SMALL, sizes))
    known = plain.evidence.shape[1]
    more = noisy.evidence.shape[1] - known
    assert more == 16
    assert torch.equal(noisy.evidence[:, :known], plain.evidence)
    assert torch.equal(noisy.candidates[:, :known], plain.candidates)
    assert not noisy.evidence[:, known:].any()
    assert noisy.candidates[:, known:].all()
    slices = noisy.texts[len(plain.texts) :]
    assert sum(map(len, slices)) == 16 * K
    assert len({tuple(tokens.tolist()) for tokens in slices}) > 1, "from several places"
    assert same(KeyRows(texts, base, sizes, first=2)[0], noisy), "the same after a resume"
    assert not same(KeyRows(texts, base, sizes)[3], noisy)


# Relevance


@torch.no_grad()
@pytest.mark.parametrize("tokens", [True, False])
@pytest.mark.parametrize("kind", ["mean", "kv"])
def test_blocks_are_as_relevant_as_a_memory_will_find_them(base, texts, tokens, kind, tmp_path):
    net = GistNet.untrained(base.d_model) if kind == "mean" else learned_gistnet(base, slots=2)
    lens = make_lens(base, tokens=tokens, gist_width=net.config.gist_width)
    for parameter in lens.parameters():
        parameter.add_(0.2 * torch.randn_like(parameter))
    batch = KeyRows(texts, base, SMALL)[0]
    assert len(batch.texts) == 2
    found = relevances(base, net, lens, batch)
    assert found.shape == batch.evidence.shape
    parts = []
    for number, ids in enumerate(batch.texts):
        engine = new_engine(
            tmp_path, base, name=str(number), gistnet=net, lens=lens, config=config(budget=256)
        )
        engine.ingestor.ingest_tokens(ids)
        keys = engine.memory.keys(1).float()
        rows = []
        for query, mask in zip(batch.queries, batch.mask, strict=True):
            asked = query[mask]
            hidden = base.features(asked)[None]
            seen = torch.ones(1, len(asked), dtype=torch.bool)
            rows.append(lens.relevance(lens.encode_queries(hidden, seen, asked[None]), keys)[0])
        parts.append(torch.stack(rows))
        engine.memory.close()
    # A memory keeps keys in half precision.
    torch.testing.assert_close(found, torch.cat(parts, dim=1), atol=2e-2, rtol=2e-2)
    assert found.std() > 0.1


def test_gradients_reach_the_lens_and_nothing_else(base, texts):
    net, lens = learned_gistnet(base), make_lens(base)
    batch = KeyRows(texts, base, SMALL)[1]
    contrastive_loss(relevances(base, net, lens, batch), batch).backward()
    learned = {n.partition(".")[0] for n, p in lens.named_parameters() if p.grad is not None}
    assert learned >= {"token_keys", "token_gates", "key_encoder", "query_head"}
    assert learned.isdisjoint({"entry_head", "cache_head", "layers", "entry_input", "cache_input"})
    assert all(p.grad is None for p in net.parameters())
    assert all(p.grad is None for p in base.model.parameters())


def test_training_finds_the_evidence(base, texts):
    lens, net = make_lens(base), GistNet.untrained(base.d_model)
    optimizer = torch.optim.AdamW(lens.parameters(), lr=0.02)
    batch = KeyRows(texts, base, SMALL)[2]
    losses = []
    for _ in range(20):
        loss = contrastive_loss(relevances(base, net, lens, batch), batch)
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.3 * losses[0]


# Loss and measure


masks = st.integers(1, 12).flatmap(
    lambda n: st.lists(
        st.lists(st.sampled_from(["evidence", "candidate", "other"]), min_size=n, max_size=n)
        .filter(lambda row: "evidence" in row),
        min_size=1, max_size=5,
    )
)  # fmt: skip


def drawn_batch(rows, seed, levels=1000):
    """A batch, and relevances on a grid of ``levels`` values: few of them make ties."""
    kinds = [[kind != "other" for kind in row] for row in rows]
    evidence = [[kind == "evidence" for kind in row] for row in rows]
    generator = torch.Generator().manual_seed(seed)
    grid = torch.randint(levels, (len(rows), len(rows[0])), generator=generator)
    return batch_of(evidence, kinds), grid / levels * 8 - 4


@given(masks, st.integers(0, 10**6))
def test_the_loss_is_minus_the_log_share_of_each_block_of_the_evidence(rows, seed):
    batch, relevance = drawn_batch(rows, seed)
    total = 0.0
    for kinds, scores in zip(rows, relevance.double().tolist(), strict=True):
        others = sum(math.exp(s) for s, k in zip(scores, kinds, strict=True) if k == "candidate")
        found = [math.exp(s) for s, kind in zip(scores, kinds, strict=True) if kind == "evidence"]
        total -= sum(math.log(one / (one + others)) for one in found) / len(found)
    assert float(contrastive_loss(relevance, batch)) == pytest.approx(total / len(rows), abs=1e-4)


def test_a_look_at_nothing_but_evidence_has_a_gradient():
    relevance = torch.zeros(1, 2, requires_grad=True)
    contrastive_loss(relevance, batch_of([[1, 1]], [[1, 1]])).backward()
    assert relevance.grad.tolist() == [[0.0, 0.0]]


def test_a_batch_without_looks_costs_nothing(base):
    lens, net = make_lens(base), GistNet.untrained(base.d_model)
    text = AskedText(torch.arange(K), (look("nobody knows?", []),), told=())
    batch = key_batch([text], base, block_size=K, query_tokens=8)
    loss = contrastive_loss(relevances(base, net, lens, batch), batch)
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert not any(p.grad.any() for p in lens.parameters() if p.grad is not None)


@given(masks, st.integers(0, 10**6), st.integers(1, 20))
def test_recall_at_k_by_counting(rows, seed, k):
    batch, relevance = drawn_batch(rows, seed)
    found = recall_at(relevance, batch, k).tolist()
    for kinds, scores, hit in zip(rows, relevance.tolist(), found, strict=True):
        ranked = sorted(
            (i for i, kind in enumerate(kinds) if kind != "other"), key=lambda i: -scores[i]
        )
        chosen = [scores[i] for i in ranked]
        if len(set(chosen)) < len(chosen):
            continue  # among equals either order is right
        assert hit == all(kinds[i] != "evidence" for i in ranked[k:])


def test_recall_never_falls_with_k():
    batch, relevance = drawn_batch([["candidate", "evidence"] * 6, ["evidence"] * 12], 5)
    shares = [float(recall_at(relevance, batch, k).float().mean()) for k in range(1, 13)]
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


# Rarity


def test_rare_tokens_count_most(base):
    lens, plain = make_lens(base), make_lens(base)
    # Four blocks, one of them short: token 5 is in all of them, 6 in two, 7 in one, but twice.
    counted = [torch.tensor([5, 6, 6, 7, 7, 5, 5]), torch.tensor([6, 5])]
    weigh_by_rarity(lens, counted, block_size=3)
    known = {5: 4, 6: 2, 7: 1}
    rarity = {t: math.log(5 / (known.get(t, 0) + 0.5)) for t in range(VOCAB_SIZE)}
    most = math.log(5 / 0.5)
    scale = lens.token_keys.embed.weight / plain.token_keys.embed.weight
    for token in (5, 6, 7, 8, 200):
        expected = torch.full((16,), max(0.0, rarity[token] / most))
        torch.testing.assert_close(scale[token].detach(), expected, rtol=1e-4, atol=1e-5)
    assert float(scale.max().detach()) <= 1 + 1e-5


def test_without_token_keys_rarity_is_nothing(base):
    lens = make_lens(base, tokens=False)
    before = {name: value.clone() for name, value in lens.state_dict().items()}
    weigh_by_rarity(lens, [torch.arange(10)], block_size=2)
    for name, value in lens.state_dict().items():
        assert torch.equal(value, before[name])
