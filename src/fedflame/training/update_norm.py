"""The L2 norm of what an update changes, and its bound."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from fedflame.messages import ClientUpdate, RoundPlan


def update_norm(update: ClientUpdate, plan: RoundPlan) -> float:
    """Return the L2 norm of the whole delta together with the change of the rescalers."""
    values = [*update.delta.tensors().values(), update.rescaler_values - plan.rescaler_values]
    return math.hypot(*(torch.linalg.vector_norm(value, dtype=torch.float64).item() for value in values))


def scaled_update(update: ClientUpdate, plan: RoundPlan, factor: float) -> ClientUpdate:
    """Return the update with its delta and the change of its rescalers times `factor`."""
    change = update.rescaler_values - plan.rescaler_values
    return replace(
        update,
        delta=update.delta.combine(update.delta, lambda value, _: value * factor),
        rescaler_values=plan.rescaler_values + change * factor,
    )
