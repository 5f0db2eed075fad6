"""How a client trains privately: what its plan says, for the number of its rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedflame.errors import UserError
from fedflame.privacy.accounting import Spending, noise_for

if TYPE_CHECKING:
    from fedflame.messages import RoundPlan


MOST_STEPS = 1_000_000
"""Of a client in a run. To account for ten times as many takes minutes."""


@dataclass(frozen=True)
class Terms:
    """What is the same in all private rounds of a client."""

    sampling_rate: float
    """The chance of each row, or of each person's rows, to be in a step."""
    expected_units: int
    """The expected number of rows, or persons, in a step."""
    noise_multiplier: float
    """The standard deviation of the noise over the clip norm."""

    def spending(self, steps: int) -> Spending:
        """Return what so many steps spend."""
        return Spending(self.sampling_rate, self.noise_multiplier, steps)


def terms_of(plan: RoundPlan, units: int) -> Terms:
    """Return the terms of a private plan for a client with so many rows, or persons.

    Raises:
        UserError: the plan asks for what would tell of rows, its delta is too large for so many rows, it has
            more than `MOST_STEPS` steps, or no noise is enough for its epsilon.
    """
    _require_private(plan)
    return private_terms(
        units,
        plan.batch_size,
        plan.noise_multiplier,
        plan.target_epsilon,
        plan.target_delta,
        plan.private_steps,
    )


def private_terms(
    units: int, batch_size: int, noise_multiplier: float, epsilon: float, delta: float, steps: int
) -> Terms:
    """Return the terms of a client with so many rows, or persons, in a run that takes so many steps there.

    Raises:
        UserError: see `terms_of`.
    """
    if not 0 < delta < 1 / units:
        raise UserError(
            f"privacy.delta = {delta:g} with {units:,} rows: it must be below {1 / units:.2g}, one over the "
            "rows, or whole rows may leave; set a smaller one"
        )
    if steps > MOST_STEPS:
        raise UserError(
            f"a private run of {steps:,} steps; it may have {MOST_STEPS:,} at most. Take fewer, larger steps "
            "(training.per_device_train_batch_size)"
        )
    expected = min(batch_size, units)
    rate = expected / units
    return Terms(rate, expected, noise_multiplier or noise_for(epsilon, delta, rate, steps))


def _require_private(plan: RoundPlan) -> None:
    """Raise UserError if a private plan asks for what would tell of rows; config.private_options says why."""
    for name, nothing in (
        ("tokens_per_step", 0),
        ("packed_length", 0),
        ("padding_free", False),
        ("gradient_accumulation_steps", 1),
        ("num_train_epochs", 0),
        ("lora_dropout", 0),
        ("router_aux_loss_coef", 0),
    ):
        if (got := getattr(plan, name)) != nothing:
            raise UserError(f"a private plan with {name} = {got}; it must be {nothing}")
    if plan.rescaler == "mass":
        raise UserError("a private plan with rescaler = 'mass'; it must be 'learned' or 'fixed'")
    if not plan.noise_multiplier and not plan.target_epsilon:
        raise UserError(
            "a private plan without noise_multiplier and target_epsilon; one of them must be above 0"
        )
