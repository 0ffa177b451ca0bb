"""What retrieving rivals read, and in which order."""

from __future__ import annotations

import pytest
import torch
from engine_cases import K, words
from tiny_models import tiny_base_model

from megacontext.evaluation.baselines import rivals
from megacontext.evaluation.baselines.attention_probe import queries_and_keys
from megacontext.evaluation.baselines.block_retrieval import BlockRetrieval


class Listed(BlockRetrieval):
    """Finds the blocks it was given."""

    name = "listed"
    hits: tuple[int, ...] = ()

    def rank(self, cursor, n_blocks, limit, query):
        return [hit for hit in self.hits if hit < n_blocks][:limit]


def listed(base, memory, hits, **habits):
    rival = Listed(base, memory, 192, **habits)
    rival.hits = hits
    return rival


@pytest.mark.parametrize(
    ("hits", "neighbours", "expected"),
    [
        # 160 tokens of room, 40 of them for the newest: three blocks, and 64 newest tokens.
        ((9, 3), 1, [(8 * K, 11 * K), (836, 900)]),
        ((9, 3), 0, [(3 * K, 4 * K), (9 * K, 10 * K), (804, 900)]),
        ((3, 9), 1, [(2 * K, 5 * K), (836, 900)]),
        ((0, 9), 1, [(0, 2 * K), (9 * K, 10 * K), (836, 900)]),
        ((3, 2, 4, 9), 1, [(2 * K, 5 * K), (836, 900)]),
        ((25, 26), 1, [(24 * K, 900)]),  # those behind the last old one are read anyway
        ((), 1, [(740, 900)]),
    ],
)
def test_blocks_with_their_neighbours_then_the_newest_tokens(
    base, remember, hits, neighbours, expected
):
    rival = listed(base, remember(base), hits, neighbours=neighbours)
    rival.context(900, torch.arange(12), 20)
    assert rival.raw_spans == expected


@pytest.mark.parametrize(("share", "blocks"), [(0.001, 4), (0.5, 2), (1.0, 0)])
def test_the_newest_tokens_keep_their_share(base, remember, share, blocks):
    rival = listed(base, remember(base), (1, 3, 5, 7, 9), neighbours=0, recent_share=share)
    rival.context(900, torch.arange(0), 32)
    assert len(rival.raw_spans) == blocks + 1
    assert rival.raw_spans[-1] == (740 + blocks * K, 900)


def test_bm25_reads_the_block_with_the_words_and_never_the_future(base, remember, habits):
    text = (
        words(300, seed=1) + " zebra quartz " + words(400, seed=2) + " zebra quartz " + words(300)
    )
    memory = remember(base, text)
    first, second = text.index("zebra"), text.rindex("zebra")
    (rival,) = rivals(["bm25"], base, memory, config=habits)
    assert set(rival.rank(1000, memory.count(1), 4, "zebra?")) >= {first // K, second // K}
    rival.context(second - 40, torch.arange(4), 8, "zebra?")
    assert any(a <= first and first + 12 <= b for a, b in rival.raw_spans)
    assert rival.raw_spans[-1][1] == second - 40


def test_bm25_asks_until_it_has_enough_old_blocks(base, remember, habits):
    # The word is in every block, and ties go to the newest: old ones come last.
    memory = remember(base, "zebra quartz " * 60 + words(20))
    (rival,) = rivals(["bm25"], base, memory, config=habits)
    assert set(rival.rank(100, 2, 2, "zebra")) == {0, 1}


def test_without_a_question_the_newest_tokens_ask(base, remember, habits):
    text = words(319, seed=1) + " zebra quartz " + words(500, seed=2) + " zebra quartz "
    memory = remember(base, text)
    (rival,) = rivals(["bm25"], base, memory, config=habits)
    rival.nll(memory.n_tokens, base.encode("amber"))
    place = text.index("zebra")
    assert any(a <= place < b for a, b in rival.raw_spans)


class TestTheProbe:
    def test_what_attention_compares_gives_back_its_weights(self, base):
        ids = base.encode(words(40))
        queries, keys = queries_and_keys(base, ids)
        assert queries.shape == (3, 40, 4, base.head_dim)
        assert keys.shape == (3, 40, base.n_kv_heads, base.head_dim)
        positions = torch.arange(40)
        turned = [base.rotation.rotate(x, positions) for x in (queries, keys)]
        repeated = turned[1].repeat_interleave(4 // base.n_kv_heads, dim=2)
        logits = torch.einsum("lqhd,lkhd->lhqk", turned[0], repeated)
        masked = logits.masked_fill(torch.ones(40, 40).triu(1).bool(), -torch.inf)
        base.model.set_attn_implementation("eager")
        try:
            output = base.model(input_ids=ids[None], output_attentions=True)
        finally:
            base.model.set_attn_implementation("sdpa")
        expected = torch.cat(output.attentions)
        torch.testing.assert_close(masked.softmax(-1), expected, rtol=1e-3, atol=1e-4)

    @pytest.mark.parametrize("implementation", ["sdpa", "eager"])
    def test_it_leaves_the_model_as_it_was(self, base, implementation):
        ids = base.encode(words(40))
        base.model.set_attn_implementation(implementation)
        try:
            before = base.model(input_ids=ids[None]).logits
            queries_and_keys(base, ids)
            assert torch.equal(base.model(input_ids=ids[None]).logits, before)
            assert base.model.config._attn_implementation == implementation
        finally:
            base.model.set_attn_implementation("sdpa")


class TestKeys:
    @pytest.mark.parametrize("name", ["own_keys", "infllm"])
    def test_they_do_not_depend_on_when_they_were_asked_for(self, base, remember, habits, name):
        text = words(900, seed=3)
        whole = remember(base, text)
        grown = remember(base, text[:430])
        (early,) = rivals([name], base, grown, config=habits)
        assert sum(map(len, early.parts())) == 13
        grown.append(base.encode(text[430:]), *gists_of(base, grown, text))
        (late,) = rivals([name], base, whole, config=habits)
        assert torch.equal(torch.cat(early.parts()), torch.cat(late.parts()))
        assert len(torch.cat(late.parts())) == 28

    def test_own_keys_are_those_of_all_tokens(self, base, remember, habits):
        memory = remember(base, words(200))
        (rival,) = rivals(["own_keys"], base, memory, config=layers(habits, 2, 0))
        _, keys = queries_and_keys(base, memory.tokens(0, 96).long())
        expected = keys[[2, 0]].unflatten(1, (3, K)).permute(1, 0, 3, 2, 4)
        torch.testing.assert_close(rival.parts()[0].float(), expected, rtol=1e-2, atol=1e-2)

    def test_the_attention_is_exact(self, base, remember, habits):
        memory = remember(base)
        (rival,) = rivals(["own_keys"], base, memory, config=habits)
        asked = rival.asked(900, "lotus jade")
        assert asked.shape == (3, 10, base.n_kv_heads, 4 // base.n_kv_heads, base.head_dim)
        keys = torch.cat(rival.parts())[:20].float().permute(1, 2, 0, 3, 4).flatten(2, 3)
        mass = torch.einsum("lmghd,lgtd->lghmt", asked, keys).softmax(-1)
        worth = mass.unflatten(-1, (20, K)).sum(-1).sum((0, 1, 2, 3))
        expected = worth.argsort(descending=True)[:6].tolist()
        assert rival.rank(900, 20, 6, "lotus jade") == expected
        assert rival.rank(900, 20, 6, "amber birch delta") != expected

    def test_a_block_of_infllm_is_what_its_most_attended_keys_sum_up_to(
        self, base, remember, habits
    ):
        memory = remember(base, words(200))
        ids = memory.tokens(0, 96).long()
        queries, keys = queries_and_keys(base, ids)
        queries = queries[1].unflatten(1, (base.n_kv_heads, -1)).sum(2)
        for count in (1, 4, K):
            config = layers(habits, 1).model_copy(update={"key_tokens": count})
            (rival,) = rivals(["infllm"], base, memory, config=config)
            for block, head in ((0, 0), (2, 1)):
                weights = [
                    float(keys[1, t, head] @ queries[t : t + 65, head].mean(0))
                    for t in range(block * K, block * K + K)
                ]
                best = torch.tensor(weights).topk(count).indices + block * K
                torch.testing.assert_close(
                    rival.parts()[0][block, 0, head].float(),
                    keys[1, best, head].sum(0),
                    rtol=1e-2,
                    atol=5e-2,
                )

    def test_relevance_of_infllm_is_the_sum_of_products(self, remember, habits):
        base = tiny_base_model("llama", max_positions=256)
        memory = remember(base)
        (rival,) = rivals(["infllm"], base, memory, config=layers(habits, 1))
        asked = rival.asked(900, "lotus")[0].sum((0, 2))
        relevance = torch.einsum("gd,bgd->b", asked, torch.cat(rival.parts())[:25, 0].float())
        expected = relevance.argsort(descending=True)[:5].tolist()
        assert rival.rank(900, 25, 5, "lotus") == expected

    def test_without_a_question_the_newest_tokens_ask(self, base, remember, habits):
        memory = remember(base)
        (rival,) = rivals(["own_keys"], base, memory, config=habits)
        asked = rival.asked(700, "")
        queries, _ = queries_and_keys(base, memory.tokens(700 - 96, 700).long())
        expected = queries[:, -32:].unflatten(2, (base.n_kv_heads, -1))
        torch.testing.assert_close(asked, expected)


def layers(habits, *chosen):
    return habits.model_copy(update={"key_layers": chosen})


def gists_of(base, memory, text):
    """What :meth:`Memory.append` needs beside the tokens, made from the whole text at once."""
    from megacontext.gistnet import GistNet
    from megacontext.runtime.gist_builder import GistBuilder

    new = base.encode(text)[memory.n_tokens :]
    built = GistBuilder(base, GistNet.untrained(base.d_model)).build(memory, new)
    return built.gists, built.keys, built.fidelity, built.block_texts


def test_few_hits_leave_the_rest_of_the_budget_alone(base, remember):
    memory = remember(base)
    rival = listed(base, memory, (9, 3, 15), most_hits=2, most_recent=20)
    rival.context(900, torch.arange(12), 20)
    # 160 tokens of room less 20 newest ones hold four blocks: a hit with both neighbours, and one.
    assert rival.raw_spans == [(3 * K, 4 * K), (8 * K, 11 * K), (880, 900)]
    rival = listed(base, memory, (9, 3, 15), most_hits=1, most_recent=20, neighbours=0)
    rival.context(900, torch.arange(12), 20)
    assert rival.raw_spans == [(9 * K, 10 * K), (880, 900)]
    rival.context(100, torch.arange(12), 20)
    assert rival.raw_spans == [(80, 100)], "what it did not find it does not read"


def test_the_few_are_as_configured(base, remember, habits):
    memory = remember(base, words(300, seed=1) + " zebra quartz " + words(600, seed=2))
    few = habits.model_copy(update={"few_hits": 1, "few_recent_tokens": 16, "neighbours": 0})
    (rival,) = rivals(["bm25_few"], base, memory, config=few)
    assert rival.name == "bm25_few"
    end = memory.n_tokens
    rival.context(end, torch.arange(4), 8, "zebra?")
    assert len(rival.raw_spans) == 2
    start, stop = rival.raw_spans[0]
    assert stop - start == K
    assert "zebra" in base.decode(memory.tokens(start - 8, stop))
    assert rival.raw_spans[1] == (end - 16, end)
