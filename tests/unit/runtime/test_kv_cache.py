import pytest
import torch
from tiny_models import tiny_base_model

from megacontext.errors import InputError
from megacontext.runtime.context_input import ContextInput
from megacontext.runtime.kv_cache import attention_mask, common_prefix, crop, same_gists

D, LAYERS, HEADS, DIM = 4, 2, 1, 3


def context(n_rows=6, positions=None, gist_positions=None, seed=0):
    random = torch.Generator().manual_seed(seed)
    rows = torch.randn(n_rows, D, generator=random)
    at = torch.arange(n_rows) if positions is None else torch.tensor(positions)
    if gist_positions is None:
        return ContextInput(rows, at)
    shape = (LAYERS, len(gist_positions), HEADS, DIM)
    keys, values = torch.randn(2, *shape, generator=random)
    return ContextInput(rows, at, keys, values, torch.tensor(gist_positions))


def changed(old, **fields):
    names = ("embeddings", "positions", "gist_keys", "gist_values", "gist_positions")
    return ContextInput(**{name: fields.get(name, getattr(old, name)) for name in names})


def with_element(tensor, index, value=9.0):
    copy = tensor.clone()
    copy[index] = value
    return copy


class TestContextInput:
    def test_counts(self):
        mixed = context(5, [2, 3, 4, 6, 7], gist_positions=[0, 1, 5])
        assert (mixed.n_rows, mixed.n_gists, len(mixed)) == (5, 3, 8)
        assert (context().n_gists, context().gists) == (0, None)

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"embeddings": torch.zeros(6)}, "floating point \\[rows, d_model\\]"),
            ({"embeddings": torch.zeros(6, D, dtype=torch.int64)}, "got int64 \\[6, 4\\]"),
            ({"positions": torch.arange(5)}, "positions must be int64 \\[6\\]"),
            ({"positions": torch.arange(6).int()}, "got int32"),
            ({"positions": torch.arange(6).flip(0)}, "oldest first"),
            ({"positions": torch.arange(6) - 1}, "negative"),
            ({"gist_keys": None}, "give all or none"),
            ({"gist_keys": torch.zeros(LAYERS, 3, HEADS, DIM)}, "must agree"),
            ({"gist_values": torch.zeros(LAYERS, 2, DIM)}, "must be \\[layers"),
            ({"gist_positions": torch.tensor([0])}, "gist_positions must be int64 \\[2\\]"),
            ({"gist_positions": torch.tensor([3, 1])}, "gist_positions must not"),
        ],
    )
    def test_what_does_not_fit_is_refused(self, fields, message):
        with pytest.raises(InputError, match=message):
            changed(context(gist_positions=[0, 1]), **fields)


class TestCommonPrefix:
    def test_equal_contexts_share_all_rows(self):
        old = context(gist_positions=[0, 3])
        assert common_prefix(old, changed(old)) == 6
        assert same_gists(old, changed(old))

    @pytest.mark.parametrize("row", range(6))
    def test_a_changed_embedding_ends_it(self, row):
        old = context()
        new = changed(old, embeddings=with_element(old.embeddings, (row, 2)))
        assert common_prefix(old, new) == row

    def test_a_changed_position_ends_it(self):
        old = context()
        assert common_prefix(old, changed(old, positions=torch.tensor([0, 1, 2, 3, 5, 6]))) == 4

    def test_length_may_differ(self):
        old = context()
        longer = ContextInput(torch.cat([old.embeddings, old.embeddings]), torch.arange(12))
        assert common_prefix(old, longer) == common_prefix(longer, old) == 6
        empty = ContextInput(old.embeddings[:0], old.positions[:0])
        assert common_prefix(old, empty) == common_prefix(empty, empty) == 0

    @pytest.mark.parametrize("field", ["gist_keys", "gist_values"])
    def test_a_changed_gist_spares_the_rows_that_do_not_see_it(self, field):
        old = context(positions=[0, 1, 3, 4, 6, 7], gist_positions=[2, 5])
        tensor = getattr(old, field)
        first = changed(old, **{field: with_element(tensor, (1, 0, 0, 1))})
        second = changed(old, **{field: with_element(tensor, (1, 1, 0, 1))})
        assert common_prefix(old, first) == 2
        assert common_prefix(old, second) == 4
        assert not same_gists(old, first)

    def test_an_added_or_moved_gist_counts_from_its_lowest_position(self):
        old = context(positions=[0, 1, 3, 4, 6, 7], gist_positions=[2, 5])
        fewer = changed(
            old,
            gist_keys=old.gist_keys[:, :1],
            gist_values=old.gist_values[:, :1],
            gist_positions=old.gist_positions[:1],
        )
        none = ContextInput(old.embeddings, old.positions)
        moved = changed(old, gist_positions=torch.tensor([2, 3]))
        assert common_prefix(old, fewer) == common_prefix(fewer, old) == 4
        assert common_prefix(old, none) == common_prefix(none, old) == 2
        assert common_prefix(old, moved) == 3, "the row at 3 does not see a gist at 3"


class TestMask:
    """Against the definition, one pair of entries at a time."""

    @pytest.mark.parametrize("name", ["llama", "mixtral-sliding", "gemma2"])
    @pytest.mark.parametrize("n_queries", [1, 4, 9])
    def test_visibility(self, name, n_queries):
        architecture = tiny_base_model(name).architecture
        gist_positions, positions = [0, 1, 7, 12], [2, 3, 4, 5, 6, 8, 9, 10, 13]
        masks = attention_mask(
            architecture,
            gist_positions=torch.tensor([gist_positions]),
            positions=torch.tensor([positions]),
            n_queries=n_queries,
            dtype=torch.float32,
        )
        if not isinstance(masks, dict):
            kind = "sliding_attention" if architecture.sliding_window else "full_attention"
            masks = {kind: masks}
        for kind, mask in masks.items():
            window = architecture.sliding_window if kind == "sliding_attention" else 10**9
            assert mask.shape == (1, 1, n_queries, 13)
            expected = []
            for query in range(len(positions) - n_queries, len(positions)):
                p = positions[query]
                gists = [g < p and p - g < window for g in gist_positions]
                rows = [r <= query and p - positions[r] < window for r in range(len(positions))]
                expected.append(gists + rows)
            visible = torch.tensor(expected)
            assert torch.equal(mask[0, 0] == 0, visible)
            assert (mask[0, 0][~visible] < -1e30).all()

    def test_padding_is_seen_by_itself_only(self):
        mask = attention_mask(
            tiny_base_model("llama").architecture,
            gist_positions=torch.tensor([[0, 0]]),
            positions=torch.tensor([[0, 0, 5, 6]]),
            n_queries=4,
            dtype=torch.float32,
            gist_valid=torch.tensor([[True, False]]),
            row_valid=torch.tensor([[False, False, True, True]]),
        )
        assert (mask[0, 0] == 0).int().tolist() == [
            [0, 0, 1, 0, 0, 0],
            [0, 0, 0, 1, 0, 0],
            [1, 0, 0, 0, 1, 0],
            [1, 0, 0, 0, 1, 1],
        ]


class TestCrop:
    def test_a_cropped_cache_and_its_origin_go_their_own_ways(self):
        base = tiny_base_model()
        ids = torch.arange(10, 22)
        cache = base.prefill(ContextInput(base.embed(ids), torch.arange(12))).cache
        before = cache.entries.layers[0].keys.clone()
        fork = crop(cache, 5)
        assert (fork.n_rows, cache.n_rows) == (5, 12)
        expected = base.prefill(
            ContextInput(base.embed(torch.cat([ids[:5], ids[:2]])), torch.arange(7))
        ).logits[5:]
        logits = base.step(ids[:2], torch.arange(5, 7), fork)
        assert (logits - expected).abs().max() < 1e-4
        assert torch.equal(cache.entries.layers[0].keys, before)

    def test_more_rows_than_there_are(self):
        base = tiny_base_model()
        cache = base.prefill(ContextInput(base.embed(torch.arange(3)), torch.arange(3))).cache
        with pytest.raises(InputError, match="cannot keep 4 rows"):
            crop(cache, 4)
