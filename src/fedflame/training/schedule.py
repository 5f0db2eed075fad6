"""The learning rate: of each round, and of each optimizer step of a client's round."""

from __future__ import annotations

import math
from collections.abc import Iterator

from fedflame.config.words import LRScheduler
from fedflame.messages import RoundPlan


def remaining(scheduler: LRScheduler, done: float, whole: float) -> float:
    """Return the share of the learning rate after `done` of `whole`: 1 at the start, 0 at the end."""
    if scheduler == "linear":
        return 1 - done / whole
    if scheduler == "cosine":
        return (1 + math.cos(math.pi * done / whole)) / 2
    return 1.0


def learning_rates(plan: RoundPlan, steps: int) -> Iterator[float]:
    """Yield the learning rate of every step of a round of so many steps.

    Within the round the plan's rate stays, or falls towards zero after the last step. In the first
    `warmup_rounds` of the run it rises in a line from step to step; the last step of the warm-up has the
    whole rate.
    """
    for step in range(steps):
        rate = plan.learning_rate * remaining(plan.lr_scheduler_type, step, steps)
        if plan.warmup_rounds:
            rate *= min(1.0, (plan.round - 1 + (step + 1) / steps) / plan.warmup_rounds)
        yield rate
