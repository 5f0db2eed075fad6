"""Compute mean and standard deviation over seeds, and paired differences with confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Literal

CONFIDENCE = 0.95

Verdict = Literal["better", "worse", "no clear difference", "one seed", "not finite"]


@dataclass(frozen=True)
class Summary:
    """Mean over seeds, and sample standard deviation, which is None for a single seed."""

    count: int
    mean: float
    """NaN where one of the values is not finite."""
    deviation: float | None
    not_finite: int = 0
    """How many of the values are not finite."""


@dataclass(frozen=True)
class Difference:
    """Mean of paired differences, and its 95 % confidence interval, which is None for a single pair.

    The mean is NaN, without an interval, where one of the differences is not finite.
    """

    count: int
    mean: float
    interval: tuple[float, float] | None

    def verdict(self, rising: bool) -> Verdict:
        """Return the result in words. `rising` says that a larger value is better."""
        if self.interval is None:
            return "one seed" if math.isfinite(self.mean) else "not finite"
        low, high = self.interval
        if low <= 0 <= high:
            return "no clear difference"
        return "better" if (low > 0) == rising else "worse"


def summarize(values: Sequence[float]) -> Summary:
    """Summarize at least one value."""
    if broken := sum(not math.isfinite(value) for value in values):
        return Summary(len(values), math.nan, None, broken)
    return Summary(len(values), fmean(values), stdev(values) if len(values) > 1 else None)


def paired_difference(differences: Sequence[float]) -> Difference:
    """Return the mean d and the interval d ± t s / sqrt(n), with Student's t at n - 1 degrees of freedom.

    There must be at least one difference, and the pairs must be independent. We assume that the differences
    are normally distributed; a few seeds cannot show whether they are.
    """
    summary = summarize(differences)
    if summary.deviation is None:
        return Difference(summary.count, summary.mean, None)
    from scipy.stats import t  # here: it takes a second to load, and most commands compare nothing

    # The standard interval is scaled here: scipy has none of width 0, which equal differences have.
    error = summary.deviation / math.sqrt(summary.count)
    low, high = t.interval(CONFIDENCE, summary.count - 1)
    return Difference(summary.count, summary.mean, (summary.mean + low * error, summary.mean + high * error))
