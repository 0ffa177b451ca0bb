"""One definition of every measure."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass


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
    rng = random.Random(seed)
    means = sorted(math.fsum(rng.choices(values, k=n)) / n for _ in range(resamples))
    low, high = means[int(0.025 * resamples)], means[int(0.975 * resamples) - 1]
    return Estimate(math.fsum(values) / n, low, high, n)
