"""The frozen-model adapter on every supported architecture, against the plain model."""

from __future__ import annotations

import pytest
import torch
from tiny_models import ARCHITECTURES, VOCAB_SIZE, tiny_base_model, tiny_model

from megacontext.errors import ModelError
from megacontext.runtime.context_input import ContextInput
from megacontext.runtime.plain_reading import read_plain

pytestmark = pytest.mark.portability

TOLERANCE = 1e-4
N = 20  # more than the sliding window of the tiny models (6)


def token_ids(n=N, seed=1):
    return torch.randint(0, 256, (n,), generator=torch.Generator().manual_seed(seed))


def raw_context(base, ids, first=0):
    return ContextInput(base.embed(ids), torch.arange(first, first + len(ids)))


def plain_logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids[None]).logits[0]


def true_entries(model, ids, gist_rows):
    """Keys before rotation and values that the plain model gives some tokens.

    The rotation is caught by wrapping the modelling module's own function for one forward: nothing
    of MegaContext takes part.
    """
    import sys

    attention = [m for m in model.modules() if hasattr(m, "is_causal") and hasattr(m, "layer_idx")]
    modeling = sys.modules[type(attention[0]).__module__]
    original = modeling.apply_rotary_pos_emb
    caught = {}
    current = []

    def catch(q, k, cos, sin, *args, **kwargs):
        caught[current[-1]] = k
        return original(q, k, cos, sin, *args, **kwargs)

    hooks = [
        module.register_forward_pre_hook(lambda m, *_: current.append(m.layer_idx))
        for module in attention
    ]
    modeling.apply_rotary_pos_emb = catch
    try:
        with torch.no_grad():
            # A cache without a config keeps all entries of sliding layers.
            from transformers import DynamicCache

            cache = DynamicCache()
            model(input_ids=ids[None], past_key_values=cache, use_cache=True)
    finally:
        modeling.apply_rotary_pos_emb = original
        for hook in hooks:
            hook.remove()
    keys, values = [], []
    for index, layer in enumerate(cache.layers):
        key = caught.get(index, layer.keys)  # a layer without rotation never calls the function
        keys.append(key[0, :, gist_rows].transpose(0, 1))
        values.append(layer.values[0, :, gist_rows].transpose(0, 1))
    return torch.stack(keys), torch.stack(values)


def with_gists(base, plain, ids, gist_rows):
    """Some tokens as kv gists with their true keys and values, the others as rows."""
    keys, values = true_entries(plain, ids, gist_rows)
    rows = torch.tensor([i for i in range(len(ids)) if i not in set(gist_rows.tolist())])
    context = ContextInput(base.embed(ids[rows]), rows, keys, values, gist_rows)
    return context, rows


@pytest.fixture(params=ARCHITECTURES)
def architecture(request):
    return request.param


@pytest.fixture
def base(architecture):
    return tiny_base_model(architecture)


@pytest.fixture
def plain(architecture):
    return tiny_model(architecture)


def close(actual, expected, tolerance=TOLERANCE):
    assert actual.shape == expected.shape
    assert (actual.float() - expected.float()).abs().max() < tolerance


def test_raw_context_equals_the_plain_model(base, plain):
    ids = token_ids()
    expected = plain_logits(plain, ids)
    assert expected.std() > 0.1, "logits too flat to show a mistake"
    close(base.prefill(raw_context(base, ids)).logits, expected)


def test_prefill_and_steps_equal_the_plain_model(base, plain):
    ids = token_ids()
    expected = plain_logits(plain, ids)
    first = base.prefill(raw_context(base, ids[:7]))
    several = base.step(ids[7:13], torch.arange(7, 13), first.cache)
    singles = [base.step(ids[i : i + 1], torch.tensor([i]), first.cache) for i in range(13, N)]
    close(torch.cat([first.logits, several, *singles]), expected)
    assert (first.cache.n_rows, first.cache.n_gists) == (N, 0)


def test_kept_logits_and_hidden_states(base, plain):
    ids = token_ids()
    result = base.prefill(raw_context(base, ids), keep=3, hidden_states=True)
    close(result.logits, plain_logits(plain, ids)[-3:])
    with torch.no_grad():
        hidden = plain(input_ids=ids[None], output_hidden_states=True).hidden_states[-1][0]
    close(result.hidden, hidden)
    close(base.features(ids), hidden)
    # Padded in one forward, each is as if alone.
    several = read_plain(base, [ids[:5], ids, ids[:9]])
    likelihood = plain_logits(plain, ids).float().log_softmax(-1)
    nll = -likelihood[:-1].gather(1, ids[1:, None])[:, 0]
    for reading in several:
        n = len(reading.hidden)
        close(reading.hidden, hidden[:n])
        close(reading.nll, nll[: n - 1])
    assert [len(reading.nll) for reading in several] == [4, N - 1, 8]


def test_bfloat16(architecture):
    base = tiny_base_model(architecture, dtype=torch.bfloat16)
    ids = token_ids()
    expected = plain_logits(tiny_model(architecture, dtype=torch.bfloat16), ids)
    result = base.prefill(raw_context(base, ids))
    assert result.logits.dtype == torch.bfloat16
    close(result.logits, expected, 1e-2)
    keys, values = true_entries(base.model, ids, torch.arange(4, 8))
    rows = torch.tensor([*range(4), *range(8, N)])
    context = ContextInput(base.embed(ids[rows]), rows, keys, values, torch.arange(4, 8))
    close(base.prefill(context).logits[4:], expected[8:], 0.25)


@pytest.mark.parametrize(
    "gist_rows", [range(4), range(4, 8), range(11), [0, 1, 5, 6, 12, 13]], ids=str
)
def test_true_keys_and_values_as_gists_change_nothing(base, plain, gist_rows):
    ids = token_ids()
    context, rows = with_gists(base, plain, ids, torch.tensor(list(gist_rows)))
    close(base.prefill(context).logits, plain_logits(plain, ids)[rows])


def test_a_gist_at_another_position_changes_the_logits(base, plain):
    ids = token_ids()
    # Only the newest rows, since a sliding layer may not see further back.
    context, rows = with_gists(base, plain, ids, torch.arange(10, 14))
    moved = ContextInput(
        context.embeddings,
        context.positions,
        context.gist_keys,
        context.gist_values,
        torch.arange(8, 12),
    )
    difference = base.prefill(moved).logits - plain_logits(plain, ids)[rows]
    assert difference.abs().max() > 100 * TOLERANCE


def test_steps_behind_gists(base, plain):
    ids = token_ids()
    context, _ = with_gists(base, plain, ids[:10], torch.arange(3, 7))
    cache = base.prefill(context).cache
    several = base.step(ids[10:15], torch.arange(10, 15), cache)
    single = base.step(ids[15:16], torch.tensor([15]), cache)
    close(torch.cat([several, single]), plain_logits(plain, ids[:16])[10:])


def test_nll_is_the_cross_entropy(base, plain):
    ids = token_ids()
    expected = torch.nn.functional.cross_entropy(
        plain_logits(plain, ids)[11:-1], ids[12:], reduction="none"
    )
    nll = base.nll(raw_context(base, ids[:12]), ids[12:])
    assert nll.dtype == torch.float32
    close(nll, expected)
    context, _ = with_gists(base, plain, ids[:12], torch.arange(2, 6))
    close(base.nll(context, ids[12:]), expected)


def test_batched_nll_equals_one_by_one(base, plain):
    ids = token_ids()
    gists, _ = with_gists(base, plain, ids[:12], torch.arange(2, 6))
    few_gists, _ = with_gists(base, plain, ids[:12], torch.arange(8, 9))
    contexts = [
        raw_context(base, ids[:12]),
        gists,
        raw_context(base, ids[3:12], first=3),
        few_gists,
        raw_context(base, ids[:1]),
    ]
    targets = torch.stack([ids[12:17], ids[12:17], ids[1:6], ids[12:17], ids[1:6]])
    batch = base.nll_batch(contexts, targets)
    one_by_one = torch.stack([base.nll(c, t) for c, t in zip(contexts, targets, strict=True)])
    close(batch, one_by_one)


def test_resuming_after_an_edit_equals_reading_anew(base, plain):
    ids = token_ids()
    old, _ = with_gists(base, plain, ids[:14], torch.arange(3, 6))
    new, _ = with_gists(base, plain, ids, torch.tensor([3, 4, 5, 12, 13]))
    cache = base.prefill(old).cache
    base.step(ids[14:16], torch.arange(14, 16), cache)
    resumed = base.resume(cache, old, new)
    assert 0 < resumed.n_rows < new.n_rows
    computed_before = resumed.n_rows
    close(base.prefill(new, resumed).logits, base.prefill(new).logits[computed_before:])
    assert cache.n_rows == old.n_rows + 2, "the old cache must stay usable"
    again = base.resume(cache, old, old)
    close(base.prefill(old, again).logits, base.prefill(old).logits[-1:])


def test_attention_mass(base, plain):
    ids = token_ids()
    context, rows = with_gists(base, plain, ids, torch.arange(12, 16))
    mass = base.attention_to(context, 3)
    plain.set_attn_implementation("eager")
    with torch.no_grad():
        weights = plain(input_ids=ids[None], output_attentions=True).attentions
    expected = torch.stack(weights)[:, 0, :, -3:].float().mean(dim=(0, 1, 2))
    close(mass, torch.cat([expected[12:16], expected[rows]]), 1e-5)
    assert mass.sum().item() == pytest.approx(1.0, abs=1e-5)


def test_the_model_is_left_as_it_was(base, plain):
    ids = token_ids()
    hooks = [module for module in base.model.modules() if module._forward_hooks]
    implementation = base.model.config._attn_implementation
    context, _ = with_gists(base, plain, ids, torch.arange(4, 8))
    base.prefill(context, hidden_states=True)
    base.attention_to(context, 2)
    base.nll_batch([context, context], ids[:6].view(2, 3))
    base.features(ids)
    assert [module for module in base.model.modules() if module._forward_hooks] == hooks
    assert not any(module._forward_pre_hooks for module in base.model.modules())
    assert base.model.config._attn_implementation == implementation
    assert not base.model.training
    for name, parameter in base.model.named_parameters():
        assert not parameter.requires_grad
        assert torch.equal(parameter, plain.get_parameter(name)), name


def test_facts_of_the_architecture(base):
    config = base.config
    assert base.d_model == config.hidden_size == base.embed(torch.tensor([1])).shape[-1]
    assert base.n_layers == config.num_hidden_layers == 3
    assert base.vocab_size == VOCAB_SIZE
    assert base.max_positions == 128
    cache = base.prefill(raw_context(base, token_ids(5))).cache
    for layer in cache.entries.layers:
        assert tuple(layer.keys.shape) == (1, base.n_kv_heads, 5, base.head_dim)
        assert tuple(layer.values.shape) == (1, base.n_kv_heads, 5, base.value_dim)


def test_rotation_is_undone_exactly(base):
    keys = torch.randn(base.n_layers, 6, base.n_kv_heads, base.head_dim)
    positions = torch.tensor([0, 1, 5, 17, 60, 127])
    rotated = base.rotation.rotate(keys, positions)
    assert (rotated - keys).abs().max() > 0.1
    close(base.rotation.unrotate(rotated, positions), keys)


@pytest.mark.parametrize(
    ("name", "rotated"), [("smollm3", [0, 2]), ("gpt-neox", [0, 1, 2]), ("llama", [0, 1, 2])]
)
def test_layers_without_rotation_are_found(name, rotated):
    assert tiny_base_model(name).rotation.rotated_layers == rotated


def test_partial_rotary_leaves_the_rest_alone():
    base = tiny_base_model("gpt-neox")
    keys = torch.randn(base.n_layers, 2, base.n_kv_heads, base.head_dim)
    rotated = base.rotation.rotate(keys, torch.tensor([9, 10]))
    changed = (rotated != keys).any(dim=0).any(dim=0).any(dim=0)
    assert changed.tolist() == [True, True] + [False] * (base.head_dim - 2)


def test_absolute_positions_take_embedding_gists_only():
    base, plain = tiny_base_model("gpt2"), tiny_model("gpt2")
    ids = token_ids()
    close(base.prefill(raw_context(base, ids)).logits, plain_logits(plain, ids))
    keys = torch.zeros(base.n_layers, 1, base.n_kv_heads, base.head_dim)
    context = ContextInput(base.embed(ids), torch.arange(1, N + 1), keys, keys, torch.tensor([0]))
    with pytest.raises(ModelError, match="'embedding' reader"):
        base.prefill(context)


def test_a_model_without_key_value_cache_is_refused():
    with pytest.raises(ModelError, match="tiny-mamba"):
        tiny_base_model("mamba")
