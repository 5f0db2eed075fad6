"""Statistics over seeds, held to numbers worked out by hand with the printed quantiles of Student's t."""

from __future__ import annotations

import math

import pytest

from fedflame.compare.intervals import Difference, paired_difference, summarize


def test_mean_and_sample_deviation_by_hand() -> None:
    # Mean 4; squares of 2, 1, 3 over n - 1 = 2: deviation sqrt(7).
    summary = summarize([2.0, 3.0, 7.0])
    assert (summary.count, summary.mean) == (3, 4.0)
    assert summary.deviation == pytest.approx(math.sqrt(7))
    assert summarize([5.0]).deviation is None


def test_a_paired_interval_by_hand() -> None:
    # Differences -1, -2, -3: mean -2, deviation 1, t of 2 degrees 4.30265, over sqrt(3) 2.48414.
    difference = paired_difference([-1.0, -2.0, -3.0])
    assert difference.mean == -2
    assert difference.interval == pytest.approx((-4.48414, 0.48414), abs=1e-5)
    # Two pairs: 12.7062 * 0.1 sqrt(2) / sqrt(2).
    assert paired_difference([0.9, 1.1]).interval == pytest.approx((-0.27062, 2.27062), abs=1e-5)


def test_words_follow_the_interval_and_the_direction() -> None:
    below, above, around = (Difference(3, 0.0, ends) for ends in ((-3.0, -1.0), (1.0, 3.0), (-1.0, 3.0)))
    assert [d.verdict(rising=False) for d in (below, above, around)] == [
        "better", "worse", "no clear difference",
    ]  # fmt: skip
    assert [d.verdict(rising=True) for d in (below, above)] == ["worse", "better"]
    assert Difference(3, 0.5, (0.0, 1.0)).verdict(rising=True) == "no clear difference"
    assert paired_difference([-4.0]).verdict(rising=False) == "one seed"


def test_equal_differences_leave_no_doubt() -> None:
    assert paired_difference([0.5, 0.5, 0.5]).interval == (0.5, 0.5)


@pytest.mark.parametrize("values", [[1.0, math.nan], [math.inf, -math.inf, 2.0], [-math.inf]])
def test_a_value_that_is_not_finite_makes_the_mean_so(values: list[float]) -> None:
    summary = summarize(values)
    assert math.isnan(summary.mean) and summary.deviation is None
    assert (summary.count, summary.not_finite) == (len(values), sum(not math.isfinite(v) for v in values))
    difference = paired_difference(values)
    assert math.isnan(difference.mean) and difference.interval is None
    assert difference.verdict(rising=True) == difference.verdict(rising=False) == "not finite"
