"""KV compression through kvpress, where its extra is installed."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from engine_cases import words
from tiny_models import tiny_base_model

from megacontext.errors import InputError, ModelError
from megacontext.evaluation.baselines import rivals
from megacontext.runtime import kv_cache
from megacontext.runtime.plain_decode import raw_context

# Not imported here: importing it is what is tested.
pytestmark = pytest.mark.skipif(find_spec("kvpress") is None, reason="needs the extra kvpress")

NAMES = ("kvpress.snapkv", "kvpress.expected_attention", "kvpress.streaming_llm", "kvpress.knorm")
STREAMING = tuple(name for name in NAMES if "expected" not in name)


@pytest.fixture(scope="module", params=["qwen3", "llama"])
def base(request):
    return tiny_base_model(request.param, max_positions=320)


def one(name, base, memory, habits):
    (rival,) = rivals([name], base, memory, config=habits)
    return rival


@pytest.mark.parametrize("name", NAMES)
def test_what_fits_the_budget_is_not_compressed(name, base, remember, habits):
    text = words(100)
    rival = one(name, base, remember(base, text), habits)
    answer = rival.answer("\nlotus? ", "lotus", max_new_tokens=6, stop="\0")
    ids = base.encode(text + "\nlotus? ")
    for _ in range(6):
        ids = torch.cat((ids, base.model(input_ids=ids[None]).logits[0, -1].argmax()[None]))
    assert answer == base.decode(ids[-6:])
    assert rival.raw_spans == [(0, 100)]
    targets = base.encode(text)[60:80]
    expected = base.nll(raw_context(base, base.encode(text)[:60]), targets)
    torch.testing.assert_close(rival.nll(60, targets), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("length", [129, 190, 240])
def test_a_history_within_the_positions_is_pruned_to_the_budget(
    name, base, remember, habits, length
):
    memory = remember(base, words(length))
    rival = one(name, base, memory, habits)
    assert rival.answer("\nlotus? ", "lotus", max_new_tokens=6, stop="\0")
    assert rival.raw_spans == []
    cache = rival._read
    assert cache is not None
    sizes = {keys.shape[2] for keys, _ in kv_cache.layer_entries(cache.entries)}
    assert sizes == {128}, "192 less 64 for prompt and answer"
    assert int(cache.positions[-1]) == length - 1
    read = base.prefill(raw_context(base, memory.tokens().long()))
    whole = torch.stack([keys[0] for keys, _ in kv_cache.layer_entries(read.cache.entries)])
    kept = torch.stack([keys[0] for keys, _ in kv_cache.layer_entries(cache.entries)])
    # Every kept key is one of the base's own, and none is there twice.
    distance, where = torch.cdist(kept, whole).min(dim=-1)
    assert float(distance.max()) < 1e-2
    assert all(len(set(head.tolist())) == 128 for layer in where for head in layer)
    if name == "kvpress.streaming_llm":
        expected = {*range(4), *range(length - 124, length)}
        assert all(set(head.tolist()) == expected for layer in where for head in layer)
    if name == "kvpress.knorm":
        lowest = whole.norm(dim=-1).sort(dim=-1).values[..., :128]
        torch.testing.assert_close(kept.norm(dim=-1).sort(dim=-1).values, lowest)


@pytest.mark.parametrize("name", STREAMING)
def test_a_longer_history_is_pruned_chunk_by_chunk(name, base, remember, habits):
    memory = remember(base)
    rival = one(name, base, memory, habits)
    first = rival.answer("\nlotus? ", "lotus", max_new_tokens=6, stop="\0")
    cache = rival._read
    assert cache is not None
    assert len(cache) == 128
    assert cache.positions.tolist() == list(range(128))
    assert rival.answer("\nlotus? ", "lotus", max_new_tokens=6, stop="\0") == first
    assert rival._read is cache, "questions share the compressed history"
    assert len(cache) == 128, "and none of them leaves a trace in it"
    targets = memory.tokens(800, 816).long()
    (fresh,) = rivals([name], base, memory, config=habits)
    for cursor in (300, 330, 700):
        rival.nll(cursor, targets)
    assert bool((rival.nll(800, targets) > 0).all())
    assert torch.equal(rival.nll(800, targets), fresh.nll(800, targets)), "going on is the same"


def test_streaming_llm_over_chunks_ends_with_sinks_and_the_newest_tokens(base, remember, habits):
    memory = remember(base)
    rival = one("kvpress.streaming_llm", base, memory, habits)
    cache = rival._history(900, 60)
    # Keys of the first layer depend on token and position alone.
    ids = memory.tokens().long()
    expected = base.prefill(raw_context(base, torch.cat((ids[:4], ids[-124:])))).cache
    for (keys, values), (right, right_values) in zip(
        kv_cache.layer_entries(cache.entries)[:1],
        kv_cache.layer_entries(expected.entries)[:1],
        strict=True,
    ):
        torch.testing.assert_close(keys, right, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(values, right_values, rtol=1e-3, atol=1e-3)


def test_one_name_stands_for_all_presses(base, remember, habits):
    made = rivals(["window", "kvpress"], base, remember(base, words(64)), config=habits)
    assert tuple(rival.name for rival in made) == ("window", *NAMES)


def test_a_pruned_history_costs_the_first_target_too(base, remember, habits):
    memory = remember(base, words(240))
    rival = one("kvpress.knorm", base, memory, habits)
    targets = memory.tokens(230, 240).long()
    full = base.nll(raw_context(base, memory.tokens(0, 230).long()), targets)
    assert abs(float(rival.nll(230, targets)[0] - full[0])) > 1e-3


def test_where_a_press_does_not_apply_it_says_so(base, remember, habits):
    memory = remember(base)
    with pytest.raises(InputError, match="longer than the 320 positions"):
        one(NAMES[1], base, memory, habits).answer("\nlotus? ", "lotus", max_new_tokens=6)
    with pytest.raises(InputError, match="leave 64 of a budget of 192"):
        one(NAMES[0], base, memory, habits).answer("\nlotus? ", "lotus", max_new_tokens=100)
    tight = habits.model_copy(update={"chunk_tokens": 32})
    with pytest.raises(InputError, match="32 tokens a chunk"):
        one(NAMES[0], base, memory, tight).answer("\nlotus? ", "lotus", max_new_tokens=6)


def test_layers_without_rotation_are_not_moved_as_if_they_had_one(remember, habits):
    base = tiny_base_model("smollm3", max_positions=320)
    memory = remember(base)
    rival = one("kvpress.knorm", base, memory, habits)
    assert rival.nll(200, memory.tokens(200, 216).long()).shape == (16,)
    with pytest.raises(InputError, match="cannot move to other positions"):
        rival.nll(800, memory.tokens(800, 816).long())


@pytest.mark.parametrize("architecture", ["gpt-neox", "gemma2"])
def test_other_architectures_are_refused(architecture, remember, habits):
    base = tiny_base_model(architecture, max_positions=320)
    with pytest.raises(ModelError, match="kvpress cannot prune"):
        one("kvpress.snapkv", base, remember(base, words(64)), habits)


def test_the_model_and_its_attention_stay_as_they_were(remember, habits):
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    base = tiny_base_model("llama", max_positions=320)
    names = [name for name, _ in base.model.named_modules()]
    one("kvpress.snapkv", base, remember(base), habits).nll(800, torch.arange(65, 75))
    assert [name for name, _ in base.model.named_modules()] == names
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward
    assert not any(module._forward_hooks for module in base.model.modules())
