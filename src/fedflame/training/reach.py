"""How far honest training can move a value, whatever the rows are. A hub refuses an update that went further.

AdamW (Kingma, Ba: Adam, arXiv 1412.6980; Loshchilov, Hutter: arXiv 1711.05101) divides a mean of gradients
by the root of their mean square, so that the size of gradients cancels. With b = beta1 and c = beta2, step t
of a value moves it, weight decay aside, by

    lr * |m| / (sqrt(v) + eps),  m = (1-b)/(1-b^t) sum_i b^(t-i) g_i,  v = (1-c)/(1-c^t) sum_i c^(t-i) g_i^2

By the inequality of Cauchy and Schwarz, |sum_i b^(t-i) g_i| is at most sqrt(sum_i q^(t-i)) times
sqrt(sum_i c^(t-i) g_i^2), with q = b^2/c. So the step is at most lr times

    s(t) = (1-b)/(1-b^t) * sqrt((1-c^t)/(1-c)) * sqrt((1-q^t)/(1-q))

and gradients that grow as (c/b)^i reach it. s(1) is 1, s(80) is 2.0, and s(t) rises to 7.3. (The paper's
(1-b)/sqrt(1-c) = 3.2 is for a gradient that was zero in all steps before.) n steps move a value by at most
lr_1 s(1) + ... + lr_n s(n), with the learning rate of each step. Gradients that are added up over batches, or
clipped by a norm, are gradients, too. Terms in the loss, such as FedProx, are part of the gradient. An expert
that rests in a step takes fewer. Weight decay adds up to |w| (1 - (1 - lr * decay)^n).
"""

from __future__ import annotations

import math
from functools import cache

from torch import Tensor

from fedflame.errors import InvalidMessage
from fedflame.messages import Adapter, ClientUpdate, RoundPlan
from fedflame.moe.masked_adamw import BETAS
from fedflame.training.schedule import learning_rates

_FLOAT32 = 2.0**-23
"""The largest relative error of two roundings in float32: that of a step, and that of the delta."""
_MOMENTS = 1.001
"""Room for rounding in the moments: c^t is 0.999 in step 1, so that 1 - c^t in float32 is wrong by 6e-5."""
_ROUNDING = {"float32": 0.0, "bfloat16": 2.0**-8, "int8": 0.5 / 127}
"""What sending changes a value by, relative to the value, and with int8 to the largest of its matrix."""
_MASS = 2.0
"""Room for a measured rescaler: some routers pick by a score that is not the weight that they return."""


@cache
def longest_step(step: int) -> float:
    """Return s(t): the furthest that step t = `step` of AdamW moves a value, in learning rates."""
    b, c = BETAS
    q = b * b / c
    spread = (1 - c**step) / (1 - c) * (1 - q**step) / (1 - q)
    return (1 - b) / (1 - b**step) * math.sqrt(spread)


def longest_way(plan: RoundPlan) -> float:
    """Return the furthest that the steps of a plan move a value, weight decay aside."""
    rates = learning_rates(plan, plan.max_steps)
    return math.fsum(rate * longest_step(step) for step, rate in enumerate(rates, 1))


def trained_reach(plan: RoundPlan) -> float:
    """Return the furthest that training by this plan moves a value of the adapter."""
    start = max(float(value.abs().max()) for value in plan.adapter.tensors().values() if value.numel())
    return _furthest(plan, start, plan.weight_decay)


def sent_reach(plan: RoundPlan, earlier: float) -> float:
    """Return the largest magnitude that a value of an honest delta has when it arrives.

    Rounding by a share q leaves q (d + e) with the client, which it adds to its next delta of at most d. So e
    is never more than d q / (1 - q), with the largest d of all rounds.

    Args:
        plan: what the client was asked for.
        earlier: the largest `trained_reach` of the plans before.
    """
    share = _ROUNDING[plan.update_dtype]
    reach = trained_reach(plan)
    owed = max(earlier, reach) * share / (1 - share) if plan.error_feedback else 0.0
    return (reach + owed) * (1 + share)


def require_within_reach(update: ClientUpdate, plan: RoundPlan, earlier: float, full_k: int) -> None:
    """Check that an honest client can have sent this update.

    Args:
        update: what arrived; all its values are finite.
        plan: what the client was asked for.
        earlier: the largest `trained_reach` of the plans before; it counts where errors are fed back.
        full_k: the model's K, which bounds a measured rescaler.

    Raises:
        InvalidMessage: a value or a rescaler moved further than AdamW can, or a measured rescaler cannot be.
    """
    moved, most = largest_value(update.delta), sent_reach(plan, earlier)
    if moved > most:
        raise InvalidMessage(_too_far("a value", moved, most))
    if plan.rescaler == "learned":
        _require_learned(update.rescaler_values, plan)
    elif plan.rescaler == "mass":
        _require_measured(update.rescaler_values, full_k / plan.active_experts)


def largest_value(adapter: Adapter) -> float:
    """Return the largest magnitude of all values."""
    return max(
        (float(value.abs().max()) for value in adapter.tensors().values() if value.numel()), default=0.0
    )


def _furthest(plan: RoundPlan, start: float, weight_decay: float) -> float:
    """Return how far the plan's steps move a value that begins at most at `start`."""
    shrinks = plan.learning_rate * weight_decay
    kept = abs(1 - shrinks) ** plan.max_steps
    drift = 1 - kept if shrinks <= 1 else 1 + kept  # beyond 1, decay changes the sign of a value
    way = longest_way(plan) * max(1.0, kept)
    reach = _MOMENTS * way + drift * start
    return reach + plan.max_steps * _FLOAT32 * (start + reach)


def _require_learned(values: Tensor, plan: RoundPlan) -> None:
    moved = float((values - plan.rescaler_values).abs().max())
    most = _furthest(plan, float(plan.rescaler_values.abs().max()), weight_decay=0.0)
    if moved > most:
        raise InvalidMessage(_too_far("a rescaler", moved, most))


def _require_measured(values: Tensor, most: float) -> None:
    """Check a ratio of routing mass: at least 1, because K experts hold the k, and at most K/k.

    The k largest weights of a token are at least k/K of its K largest.
    """
    low, high = float(values.min()), float(values.max())
    if low < 1 / _MASS or high > _MASS * most:
        raise InvalidMessage(
            f"update has measured rescalers from {low:.3g} to {high:.3g}; "
            f"{1 / _MASS:g} to {_MASS * most:g} are possible"
        )


def _too_far(what: str, moved: float, most: float) -> str:
    return f"update moves {what} by {moved:.3g}; an honest client moves one by at most {most:.3g}"
