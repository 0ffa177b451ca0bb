import pytest
import torch

from megacontext.errors import InputError
from megacontext.lensnet import LensNet, LensNetConfig, relevance
from megacontext.lensnet.keys import unit

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
def test_untrained_token_keys_compare_as_bags_of_words():
    """The head start: texts with common words score above others before any training."""
    net = LensNet(LensNetConfig(d_model=D, key_width=128, key_vocabulary=1000, n_queries=1))
    generator = torch.Generator().manual_seed(0)
    texts = torch.randint(1000, (200, 32), generator=generator)
    gists, levels = torch.randn(200, D, generator=generator), torch.ones(200).long()
    keys = net.encode_keys(gists, levels, texts)
    asked = torch.cat((texts[:, 5:11], torch.randint(1000, (200, 4), generator=generator)), dim=1)
    tail = torch.randn(200, 10, D, generator=generator)
    queries = net.encode_queries(tail, torch.ones(200, 10).bool(), asked)
    found = net.relevance(queries, keys).argmax(dim=1)
    assert (found == torch.arange(200)).float().mean() > 0.7


@torch.no_grad()
def test_token_sums_equal_a_loop_and_ignore_what_is_missing():
    net = make(key_vocabulary=50)
    tokens = torch.tensor([[3, 7, 7, -1], [-1, 1, 49, 0]])
    table = net.token_keys.embed.weight
    want = torch.stack([sum(table[t] for t in row if t >= 0) for row in tokens])
    torch.testing.assert_close(net.token_keys(tokens), want)
    weights = torch.rand(2, 4, 3)
    got = net.token_keys(tokens, weights)
    for b in range(2):
        for q in range(3):
            total = sum(weights[b, i, q] * table[t] for i, t in enumerate(tokens[b]) if t >= 0)
            torch.testing.assert_close(got[b, q], total)


@torch.no_grad()
def test_padding_tokens_do_not_change_queries():
    net = make(key_vocabulary=50)
    hidden, mask = torch.randn(2, 6, D), torch.ones(2, 6).bool()
    tokens = torch.randint(50, (2, 6))
    queries = net.encode_queries(hidden, mask, tokens)
    padded = net.encode_queries(
        torch.cat((torch.full((2, 3, D), float("nan")), hidden), dim=1),
        torch.cat((torch.zeros(2, 3).bool(), mask), dim=1),
        torch.cat((torch.full((2, 3), 10**6), tokens), dim=1),
    )
    torch.testing.assert_close(padded, queries, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("vocabulary", [0, 50])
def test_every_key_parameter_trains(vocabulary):
    net = make(key_vocabulary=vocabulary)
    told = torch.randint(50, (6, 8)) if vocabulary else None
    asked = torch.randint(50, (2, 5)) if vocabulary else None
    keys = net.encode_keys(torch.randn(6, D), torch.arange(1, 7), told)
    queries = net.encode_queries(torch.randn(2, 5, D), torch.ones(2, 5).bool(), asked)
    net.relevance(queries, keys).pow(3).sum().backward()
    trained = [net.key_encoder, net.tail_encoder, net.query_head]
    trained += [net.token_keys, net.token_gates] if vocabulary else []
    for module in trained:
        for name, parameter in module.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name


def test_untrained_token_keys_can_start_to_learn():
    net = LensNet(LensNetConfig(d_model=D, key_vocabulary=50))
    keys = net.encode_keys(torch.randn(6, D), torch.ones(6).long(), torch.randint(50, (6, 8)))
    hidden, asked = torch.randn(2, 5, D), torch.randint(50, (2, 5))
    queries = net.encode_queries(hidden, torch.ones(2, 5).bool(), asked)
    net.relevance(queries, keys).pow(3).sum().backward()
    maps = (net.key_encoder.map, net.query_head.map, net.token_gates.map, net.token_keys.embed)
    for module in maps:
        assert module.weight.grad.abs().sum() > 0


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


def test_missing_and_foreign_tokens_are_named():
    net = make(key_vocabulary=50)
    hidden, mask = torch.zeros(1, 2, D), torch.ones(1, 2).bool()
    with pytest.raises(InputError, match=r"give the tail's tokens, int64 \(1, 2\)"):
        net.encode_queries(hidden, mask)
    with pytest.raises(InputError, match=r"token 50 is outside key_vocabulary \(50\)"):
        net.encode_queries(hidden, mask, torch.tensor([[0, 50]]))
    with pytest.raises(InputError, match=r"expected int64 \[2, t\]"):
        net.encode_keys(torch.zeros(2, D), torch.ones(2).long(), torch.zeros(3, 8).long())
