"""One definition of every measure."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval and the number of samples behind it."""

    value: float
    low: float
    high: float
    n: int

    def as_result(self, name: str) -> dict[str, object]:
        """The estimate as a benchmark's JSON line lists it."""
        return {
            "name": name,
            "value": round(self.value, 6),
            "n": self.n,
            "ci95": [round(self.low, 6), round(self.high, 6)],
        }


def proportion(hits: int, n: int) -> Estimate:
    """A share with its Wilson score interval (Wilson, 1927).

    Raises:
        ValueError: ``n`` is not positive, or ``hits`` lies outside 0 to ``n``.
    """
    if n <= 0:
        raise ValueError("a proportion needs at least one sample")
    if not 0 <= hits <= n:
        raise ValueError(f"{hits} hits of {n} is no proportion")
    z, share = 1.959963984540054, hits / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    # At the ends the interval closes exactly; rounding would leave it a last bit short or beyond.
    low = 0.0 if hits == 0 else min(share, centre - half)
    high = 1.0 if hits == n else max(share, centre + half)
    return Estimate(share, low, high, n)


def mean(values: Sequence[float], *, seed: int = 0, resamples: int = 2000) -> Estimate:
    """A mean with its percentile bootstrap interval (Efron, 1979).

    Raises:
        ValueError: there is no value.
    """
    n = len(values)
    if n == 0:
        raise ValueError("a mean needs at least one sample")
    low, high = _bootstrap(
        lambda drawn: math.fsum(values[i] for i in drawn) / n, n, seed, resamples
    )
    return Estimate(math.fsum(values) / n, low, high, n)


def ratio(
    numerators: Sequence[float],
    denominators: Sequence[float],
    *,
    seed: int = 0,
    resamples: int = 2000,
) -> Estimate:
    """Mean of one measure over that of another, taken on the same samples; percentile bootstrap.

    Resamples whose denominator is zero do not count.

    Raises:
        ValueError: there is no sample, the two differ in number, or the denominators' sum is zero.
    """
    n = _pairs(numerators, denominators)
    whole = math.fsum(denominators)
    if whole == 0:
        raise ValueError("a ratio needs denominators that do not sum to zero")

    def of(drawn: Sequence[int]) -> float | None:
        below = math.fsum(denominators[i] for i in drawn)
        return math.fsum(numerators[i] for i in drawn) / below if below else None

    low, high = _bootstrap(of, n, seed, resamples)
    return Estimate(math.fsum(numerators) / whole, low, high, n)


def ratio_of_medians(
    numerators: Sequence[float],
    denominators: Sequence[float],
    *,
    seed: int = 0,
    resamples: int = 2000,
) -> Estimate:
    """Median of one duration over that of another, taken by turns; percentile bootstrap.

    Of durations on a machine that others use, the median is of those that nobody disturbed.

    Raises:
        ValueError: there is no sample, the two differ in number, or a denominator is not positive.
    """
    n = _positive_pairs(numerators, denominators)

    def of(drawn: Sequence[int]) -> float:
        below = median(denominators[i] for i in drawn)
        return median(numerators[i] for i in drawn) / below

    low, high = _bootstrap(of, n, seed, resamples)
    return Estimate(of(range(n)), low, high, n)


def median_of_ratios(
    numerators: Sequence[float],
    denominators: Sequence[float],
    *,
    seed: int = 0,
    resamples: int = 2000,
) -> Estimate:
    """Median of the ratios of durations taken right after each other; percentile bootstrap.

    Where a machine is quick for a while and then slow, both durations of a pair mostly fall into
    the same while, and the ratio does not change with it.

    Raises:
        ValueError: there is no sample, the two differ in number, or a denominator is not positive.
    """
    n = _positive_pairs(numerators, denominators)
    ratios = [above / below for above, below in zip(numerators, denominators, strict=True)]
    low, high = _bootstrap(lambda drawn: median(ratios[i] for i in drawn), n, seed, resamples)
    return Estimate(median(ratios), low, high, n)


def _pairs(numerators: Sequence[float], denominators: Sequence[float]) -> int:
    n = len(numerators)
    if n == 0 or n != len(denominators):
        raise ValueError(f"a ratio needs equally many samples, got {n} and {len(denominators)}")
    return n


def _positive_pairs(numerators: Sequence[float], denominators: Sequence[float]) -> int:
    n = _pairs(numerators, denominators)
    if min(denominators) <= 0:
        raise ValueError("a ratio of durations needs denominators above zero")
    return n


def _bootstrap(
    of: Callable[[Sequence[int]], float | None], n: int, seed: int, resamples: int
) -> tuple[float, float]:
    """The 2.5th and 97.5th percentile of what ``of`` says of ``n`` samples drawn with return.

    Draws of which it says nothing do not count.
    """
    rng = random.Random(seed)
    said = (of(rng.choices(range(n), k=n)) for _ in range(resamples))
    found = sorted(value for value in said if value is not None)
    return found[int(0.025 * len(found))], found[max(0, int(0.975 * len(found)) - 1)]


def rank_correlation(left: Sequence[float], right: Sequence[float]) -> float:
    """Spearman's rank correlation (1904), ties at their mean rank; NaN where one side is constant.

    Raises:
        ValueError: the two differ in number or there are fewer than two samples.
    """
    if len(left) != len(right) or len(left) < 2:
        raise ValueError(f"cannot correlate {len(left)} with {len(right)} samples")
    first, second = _ranks(left), _ranks(right)
    middle = (len(left) - 1) / 2
    top = math.fsum((a - middle) * (b - middle) for a, b in zip(first, second, strict=True))
    spread = [math.fsum((a - middle) ** 2 for a in ranks) for ranks in (first, second)]
    return top / math.sqrt(spread[0] * spread[1]) if all(spread) else math.nan


def _ranks(values: Sequence[float]) -> list[float]:
    order = sorted(range(len(values)), key=values.__getitem__)
    ranks = [0.0] * len(values)
    start = 0
    while start < len(order):
        end = start
        while end + 1 < len(order) and values[order[end + 1]] == values[order[start]]:
            end += 1
        for place in range(start, end + 1):
            ranks[order[place]] = (start + end) / 2
        start = end + 1
    return ranks
