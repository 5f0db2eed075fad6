"""Mean and spread over seeds, and paired differences with confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Literal

CONFIDENCE = 0.95
_HALVINGS = 60
"""Of a right angle: what is left is below the spacing of floats."""

Verdict = Literal["better", "worse", "no clear difference", "one seed"]


@dataclass(frozen=True)
class Summary:
    """Mean over seeds and sample standard deviation; None for a single seed."""

    count: int
    mean: float
    deviation: float | None


@dataclass(frozen=True)
class Difference:
    """Mean of paired differences and its 95 % confidence interval; None for a single pair."""

    count: int
    mean: float
    interval: tuple[float, float] | None

    def verdict(self, rising: bool) -> Verdict:
        """In plain words; `rising`: more is better."""
        if self.interval is None:
            return "one seed"
        low, high = self.interval
        if low <= 0 <= high:
            return "no clear difference"
        return "better" if (low > 0) == rising else "worse"


def summarize(values: Sequence[float]) -> Summary:
    """Of at least one value."""
    return Summary(len(values), fmean(values), stdev(values) if len(values) > 1 else None)


def paired_difference(differences: Sequence[float]) -> Difference:
    """Mean d and d ± t s / sqrt(n), where t is the quantile of Student's distribution at n - 1 degrees.

    The differences must be of independent pairs, at least one; that they are normally distributed is
    assumed and cannot be seen from a few seeds.
    """
    summary = summarize(differences)
    if summary.deviation is None:
        return Difference(summary.count, summary.mean, None)
    reach = t_quantile(CONFIDENCE, summary.count - 1) * summary.deviation / math.sqrt(summary.count)
    return Difference(summary.count, summary.mean, (summary.mean - reach, summary.mean + reach))


def t_quantile(confidence: float, degrees: int) -> float:
    """The t that |T| stays below with this probability, for whole degrees of freedom of at least 1."""
    low, high = 0.0, math.pi / 2
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if _probability(middle, degrees) < confidence else (low, middle)
    return math.sqrt(degrees) * math.tan(low)


def _probability(angle: float, degrees: int) -> float:
    """P(|T| < t) for t = sqrt(degrees) tan(angle), exactly: Abramowitz and Stegun, 26.7.3 and 26.7.4."""
    odd = degrees % 2
    term = math.cos(angle) if odd else 1.0
    total = 0.0
    for power in range(odd, degrees - 1, 2):
        total += term
        term *= math.cos(angle) ** 2 * (power + 1) / (power + 2)
    total *= math.sin(angle)
    return (angle + total) * 2 / math.pi if odd else total
