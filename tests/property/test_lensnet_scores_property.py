"""Padding changes no score; the order of spans only the order of scores."""

import dataclasses

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megacontext.lensnet import (
    N_FEATURES,
    CacheFeatures,
    EntryFeatures,
    LensNet,
    LensNetConfig,
    SpanFacts,
    TailStates,
    span_features,
)

D, B = 8, 2
NET = LensNet(LensNetConfig(d_model=D, d_hidden=16, n_heads=2, d_ff=8, key_width=8))
with torch.no_grad():
    for parameter in NET.parameters():
        seeded = torch.Generator().manual_seed(parameter.numel())
        parameter.add_(0.3 * torch.randn(parameter.shape, generator=seeded))

SIZES = st.integers(0, 6)
SEEDS = st.integers(0, 2**31)


def draw_batch(generator, n, m, t):
    def floats(*shape):
        return torch.randn(*shape, generator=generator)

    def flips(*shape):
        return torch.rand(*shape, generator=generator) > 0.3

    entries = EntryFeatures(
        floats(B, n, D), floats(B, n, N_FEATURES), flips(B, n), flips(B, n), flips(B, n)
    )
    cache = CacheFeatures(floats(B, m, D), floats(B, m, N_FEATURES), flips(B, m))
    return entries, cache, TailStates(floats(B, t, D), flips(B, t))


def pad_columns(part, positions):
    """Puts padding between the columns: rubbish everywhere but in the mask.

    Returns the padded part and where each column went.
    """
    count = part.mask.shape[1]
    sources = list(range(count))
    for position in positions:
        sources.insert(position % (len(sources) + 1), count)
    values = {}
    for name, value in vars(part).items():
        rubbish = torch.full_like(value[:, :1], float("nan") if value.is_floating_point() else 1)
        if name == "mask":
            rubbish = ~rubbish
        values[name] = torch.cat((value, rubbish), dim=1)[:, sources]
    places = [place for place, source in enumerate(sources) if source < count]
    return type(part)(**values), places


def reorder(part, order):
    return type(part)(**{name: value[:, order] for name, value in vars(part).items()})


def close(first, second):
    torch.testing.assert_close(first, second, atol=1e-5, rtol=1e-4)


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 6), m=st.integers(1, 6), t=st.integers(1, 6), seed=SEEDS, data=st.data())
@torch.no_grad()
def test_padding_changes_no_score(n, m, t, seed, data):
    batch = draw_batch(torch.Generator().manual_seed(seed), n, m, t)
    scores = NET(*batch)
    positions = st.lists(st.integers(0, 20), max_size=3)
    (entries, cache, tail), (entry_at, cache_at, _) = zip(
        *(pad_columns(part, data.draw(positions)) for part in batch), strict=True
    )
    padded = NET(entries, cache, tail)
    close(padded.entry[:, entry_at], scores.entry)
    close(padded.cache[:, cache_at], scores.cache)
    assert not padded.entry[~entries.mask].any()
    assert not padded.cache[~cache.mask].any()


@settings(max_examples=40, deadline=None)
@given(n=SIZES, m=SIZES, t=SIZES, seed=SEEDS)
@torch.no_grad()
def test_order_of_spans_is_only_order_of_scores(n, m, t, seed):
    generator = torch.Generator().manual_seed(seed)
    entries, cache, tail = draw_batch(generator, n, m, t)
    scores = NET(entries, cache, tail)
    entry_order = torch.randperm(n, generator=generator)
    cache_order = torch.randperm(m, generator=generator)
    mixed = NET(reorder(entries, entry_order), reorder(cache, cache_order), tail)
    close(mixed.entry, scores.entry[:, entry_order])
    close(mixed.cache, scores.cache[:, cache_order])


@settings(max_examples=40, deadline=None)
@given(n=SIZES, pad=st.integers(0, 3), seed=SEEDS)
def test_features_ignore_padding_and_order(n, pad, seed):
    generator = torch.Generator().manual_seed(seed)

    def scores():
        values = torch.rand(B, n + pad, generator=generator)
        return values.masked_fill(values < 0.3, float("nan"))

    def counts():
        return torch.randint(0, 5000, (B, n + pad), generator=generator)

    def flags():
        return torch.rand(B, n + pad, generator=generator) > 0.5

    starts = counts()
    facts = SpanFacts(
        counts(),
        starts,
        starts + 1 + counts(),
        counts(),
        counts(),
        *(scores() for _ in range(5)),
        *(flags() for _ in range(5)),
        mask=torch.arange(n + pad).expand(B, -1) < n,
        cursor=torch.tensor([5000, 100]),
        tail_start=torch.tensor([4000, 50]),
    )
    whole = span_features(facts)
    assert whole.isfinite().all()
    per_batch = {"cursor", "tail_start"}
    order = torch.randperm(n + pad, generator=generator)
    cut, mixed = (
        dataclasses.replace(
            facts,
            **{
                name: value[:, columns]
                for name, value in vars(facts).items()
                if name not in per_batch
            },
        )
        for columns in (slice(0, n), order)
    )
    assert torch.equal(span_features(cut), whole[:, :n])
    assert torch.equal(span_features(mixed), whole[:, order])
