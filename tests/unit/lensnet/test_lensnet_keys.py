import pytest
import torch

from megacontext.errors import InputError
from megacontext.lensnet import LensNet, LensNetConfig, relevance
from megacontext.lensnet.keys import SummaryProjection, unit

D = 24


def make(**values):
    settings = {"d_model": D, "key_width": 16, "n_queries": 3, "d_hidden": 16, "d_ff": 8}
    net = LensNet(LensNetConfig(**(settings | {"n_heads": 2} | values)))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return net


def slow_relevance(queries, keys, interaction):
    batch, n_queries, _ = queries.shape
    n = keys.shape[-2]
    result = torch.empty(batch, n)
    for b in range(batch):
        for i in range(n):
            key = keys[b, i] if keys.ndim == 3 else keys[i]
            dots = [float(queries[b, q] @ key) for q in range(n_queries)]
            result[b, i] = max(dots) if interaction == "max" else sum(dots) / n_queries
    return result


@pytest.mark.parametrize("interaction", ["max", "mean"])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_relevance_equals_a_double_loop_for_every_chunk(interaction, shared, chunk):
    torch.manual_seed(0)
    queries = torch.randn(2, 3, 16)
    keys = torch.randn(7, 16) if shared else torch.randn(2, 7, 16)
    got = relevance(queries, keys, interaction=interaction, chunk=chunk)
    want = slow_relevance(queries, keys, interaction)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_relevance_of_half_precision_keys_and_of_none():
    queries = torch.randn(2, 3, 16)
    keys = torch.randn(5, 16).half()
    assert torch.equal(relevance(queries, keys), relevance(queries, keys.float()))
    assert relevance(queries, keys[:0]).shape == (2, 0)


def test_model_uses_its_interaction():
    queries, keys = torch.randn(2, 3, 16), torch.randn(5, 16)
    for interaction in ("max", "mean"):
        got = make(interaction=interaction).relevance(queries, keys, chunk=2)
        torch.testing.assert_close(got, relevance(queries, keys, interaction=interaction))


@torch.no_grad()
def test_keys_have_length_one_and_follow_gist_and_level():
    net = make()
    gists, levels = torch.randn(5, D), torch.ones(5).long()
    keys = net.encode_keys(gists, levels)
    assert keys.shape == (5, 16)
    torch.testing.assert_close(keys.norm(dim=-1), torch.ones(5), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(net.encode_keys(gists, levels + 1), keys, atol=1e-2)
    assert torch.equal(
        net.encode_keys(gists.half(), levels), net.encode_keys(gists.half().float(), levels)
    )
    assert net.encode_keys(gists[:0], levels[:0]).shape == (0, 16)


@torch.no_grad()
def test_queries_ignore_padding_on_either_side_and_know_the_order():
    net = make()
    hidden, mask = torch.randn(2, 6, D), torch.ones(2, 6).bool()
    queries = net.encode_queries(hidden, mask)
    assert queries.shape == (2, 3, 16)
    rubbish = torch.full((2, 4, D), float("nan"))
    padding = torch.zeros(2, 4).bool()
    for order in (1, -1):
        padded = net.encode_queries(
            torch.cat((rubbish, hidden)[::order], dim=1), torch.cat((padding, mask)[::order], dim=1)
        )
        torch.testing.assert_close(padded, queries, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(net.encode_queries(hidden.flip(1), mask), queries, atol=1e-3)
    nothing = net.encode_queries(hidden, torch.zeros(2, 6).bool())
    assert nothing.isfinite().all()
    torch.testing.assert_close(net.encode_queries(hidden[:, :0], mask[:, :0]), nothing)


@torch.no_grad()
def test_untrained_summaries_compare_as_they_are():
    """The head start: related summaries score above unrelated ones before any training."""
    net = LensNet(LensNetConfig(d_model=256, key_summary=True, n_queries=1))
    generator = torch.Generator().manual_seed(0)
    summaries = torch.randn(200, 256, generator=generator)
    gists, levels = torch.randn(200, 256, generator=generator), torch.ones(200).long()
    keys = net.encode_keys(gists, levels, summaries)
    noisy = summaries + 0.5 * torch.randn(200, 256, generator=generator)
    tail = torch.randn(200, 4, 256, generator=generator)
    queries = net.encode_queries(tail, torch.ones(200, 4).bool(), noisy[:, None])
    found = net.relevance(queries, keys).argmax(dim=1)
    assert (found == torch.arange(200)).float().mean() > 0.95


@torch.no_grad()
def test_summary_projection_is_fixed_by_the_seed_and_saved(tmp_path):
    config = LensNetConfig(d_model=D, key_summary=True, init_seed=7)
    first, second = SummaryProjection(config), SummaryProjection(config)
    assert torch.equal(first.fixed, second.fixed)
    net = LensNet(config)
    net.save_pretrained(tmp_path)
    assert torch.equal(LensNet.from_pretrained(tmp_path).summary.fixed, first.fixed)


@pytest.mark.parametrize("key_summary", [False, True])
def test_every_key_parameter_trains(key_summary):
    net = make(key_summary=key_summary)
    summary = torch.randn(6, D) if key_summary else None
    sought = torch.randn(2, 3, D) if key_summary else None
    keys = net.encode_keys(torch.randn(6, D), torch.arange(1, 7), summary)
    queries = net.encode_queries(torch.randn(2, 5, D), torch.ones(2, 5).bool(), sought)
    net.relevance(queries, keys).pow(3).sum().backward()
    trained = [net.key_encoder, net.tail_encoder, net.query_head]
    for module in [*trained, net.summary] if key_summary else trained:
        for name, parameter in module.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name


def test_untrained_summary_keys_can_start_to_learn():
    net = LensNet(LensNetConfig(d_model=D, key_summary=True))
    keys = net.encode_keys(torch.randn(6, D), torch.ones(6).long(), torch.randn(6, D))
    hidden = torch.randn(2, 5, D)
    queries = net.encode_queries(hidden, torch.ones(2, 5).bool(), torch.randn(2, 4, D))
    net.relevance(queries, keys).pow(3).sum().backward()
    for parameter in (net.key_encoder.map.weight, net.query_head.map.weight, net.summary.learned):
        assert parameter.grad.abs().sum() > 0


def test_unit_is_safe_at_zero():
    x = torch.zeros(2, 16, requires_grad=True)
    unit(x).sum().backward()
    assert torch.equal(unit(x), torch.zeros(2, 16))
    assert x.grad.isfinite().all()
    assert x.grad.abs().max() < 1e5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda net: net.encode_keys(torch.zeros(2, D + 1), torch.ones(2).long()), r"\[n, 24\]"),
        (lambda net: net.encode_keys(torch.zeros(2, D), torch.ones(3).long()), r"expected \[2\]"),
        (lambda net: net.encode_keys(torch.zeros(2, D), torch.tensor([0, 9])), "from 0 to 9"),
        (
            lambda net: net.encode_keys(torch.zeros(1, D), torch.ones(1).long(), torch.zeros(1, D)),
            "key_summary off",
        ),
        (
            lambda net: net.encode_queries(torch.zeros(1, 2, D), torch.ones(1, 3).bool()),
            r"expected floating \(1, 3, 24\)",
        ),
        (
            lambda net: net.encode_queries(torch.zeros(1, 2, D), torch.ones(1, 2)),
            r"expected bool \(1, 2\)",
        ),
        (lambda net: net.relevance(torch.zeros(1, 3, 16), torch.zeros(4, 15)), "do not fit"),
        (lambda net: net.relevance(torch.zeros(2, 3, 16), torch.zeros(1, 4, 16)), "do not fit"),
        (lambda net: net.relevance(torch.zeros(1, 3, 16), torch.zeros(4, 16), chunk=0), "chunk"),
    ],
)
def test_bad_inputs_are_named(call, message):
    with pytest.raises(InputError, match=message):
        call(make())


def test_missing_and_misshapen_summaries_are_named():
    net = make(key_summary=True)
    with pytest.raises(InputError, match=r"give a summary of shape \(2, 24\)"):
        net.encode_keys(torch.zeros(2, D), torch.ones(2).long())
    with pytest.raises(InputError, match=r"expected \(1, 3, 24\)"):
        net.encode_queries(torch.zeros(1, 2, D), torch.ones(1, 2).bool(), torch.zeros(1, 2, D))
