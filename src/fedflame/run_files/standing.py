"""Which round of a run is best, and how long none was better: what its evaluations add up to.

Early stopping is that of transformers' `EarlyStoppingCallback`, over the mean of all k: what is better than
the best before is the best from then on, and ends the waiting where it is better by more than the threshold.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from fedflame.config.words import BestMetric


@dataclass(frozen=True)
class Best:
    """The best value of a metric so far, and the first round that had it."""

    round: int
    value: float


@dataclass(frozen=True)
class Standing:
    """What is known after one evaluated round."""

    round: int = -1
    of_tier: Mapping[int, Best] = field(default_factory=dict)
    """k -> its best round so far; without a k whose metric was never finite."""
    mean: Best | None = None
    """The best mean over all k; None where none was finite."""
    waited: int = 0
    """Evaluations since the last improvement of the mean."""

    def after(
        self, round_number: int, values: Mapping[int, float], metric: BestMetric, threshold: float
    ) -> Standing:
        """Return what is known after another round, whose metric is `values` by k."""
        of_tier = dict(self.of_tier)
        for k, value in values.items():
            if _gain(value, of_tier.get(k), metric) > 0:
                of_tier[k] = Best(round_number, value)
        together = fmean(values.values())
        gain = _gain(together, self.mean, metric)
        mean = Best(round_number, together) if gain > 0 else self.mean
        return Standing(round_number, of_tier, mean, 0 if gain > threshold else self.waited + 1)


Taken = tuple[int, int, float | None]
"""A round, a k and the metric on all held-out rows; None where it was not taken."""


def taken(events: Iterable[Mapping[str, Any]], metric: BestMetric) -> list[Taken]:
    """Return what the lines of a metrics.jsonl say of a metric."""
    whole = (event for event in events if event["event"] == "evaluation" and event["category"] is None)
    return [(event["round"], event["active_experts"], event[metric]) for event in whole]


def standings(of: Iterable[Taken], metric: BestMetric, threshold: float = 0.0) -> list[Standing]:
    """Return what was known after each round in which the metric was taken, in order."""
    by_round: dict[int, dict[int, float]] = {}
    for number, k, value in of:
        if value is not None:
            by_round.setdefault(number, {})[k] = value
    found, last = [], Standing()
    for number, values in sorted(by_round.items()):
        last = last.after(number, values, metric, threshold)
        found.append(last)
    return found


def best_rounds(found: Sequence[Standing], round_number: int) -> dict[int, int]:
    """Return k -> its best round, as it was known after a round."""
    known = [standing for standing in found if standing.round <= round_number]
    return {k: best.round for k, best in known[-1].of_tier.items()} if known else {}


def in_words(rounds: Mapping[int, int], last: int) -> str:
    """Format rounds by k: `k = 8: round 9 of 10; k = 4: round 7 of 10`."""
    return "; ".join(
        f"k = {k}: round {number} of {last}" for k, number in sorted(rounds.items(), reverse=True)
    )


def _gain(value: float, best: Best | None, metric: BestMetric) -> float:
    """Return by how much a value is better; negative or zero where it is not, or is not finite."""
    if not math.isfinite(value):
        return -math.inf
    if best is None:
        return math.inf
    return best.value - value if metric == "loss" else value - best.value
