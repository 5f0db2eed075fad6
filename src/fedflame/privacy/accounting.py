"""How much a client's answers tell of a row at most: epsilon at a given delta.

Every step is a Gaussian mechanism on a Poisson sample. Their privacy loss distributions are composed
numerically (Doroshenko et al., arXiv 2207.04380) by `dp-accounting`, whose estimates are upper bounds.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

from fedflame.errors import UserError

_DISCRETIZATION = 1e-3
"""Of the privacy loss. A finer one changes epsilon in the fourth digit, and takes ten times as long."""
_LEAST_NOISE, _MOST_NOISE = 0.1, 1e4
_MOST_LOSS = 1000.0
"""Beyond about this, in nats, epsilon says nothing and takes minutes to compute: it is called infinite."""
_LEAST_EPSILON = 1e-6
"""What a smaller one counts as where its logarithm is taken, since it may be 0."""
_PRECISION = 1e-3
"""Relative, of a noise multiplier that is searched for; it is rounded up."""


@dataclass(frozen=True)
class Spending:
    """Private steps of one kind."""

    sampling_rate: float
    """The chance of a row to be in a step."""
    noise_multiplier: float
    """The standard deviation of the noise over the clip norm."""
    steps: int


def require_accounting() -> None:
    """Raise UserError if the package that computes epsilon is not installed."""
    if find_spec("dp_accounting") is None:
        raise UserError("privacy.unit = 'row' needs the package dp-accounting; install fedflame[privacy]")


def epsilon_of(spent: Iterable[Spending], delta: float) -> float:
    """Return epsilon of all these steps together; 0 for none, infinite where a step has no noise."""
    steps: Counter[tuple[float, float]] = Counter()
    for one in spent:
        steps[one.sampling_rate, one.noise_multiplier] += one.steps
    kinds = tuple(sorted((*kind, count) for kind, count in steps.items() if count))
    return _epsilon(kinds, delta)


@cache
def _epsilon(kinds: tuple[tuple[float, float, int], ...], delta: float) -> float:
    if not kinds:
        return 0.0
    loss = sum(steps * (rate / noise) ** 2 / 2 for rate, noise, steps in kinds if noise)
    if loss > _MOST_LOSS or any(noise < _LEAST_NOISE for _, noise, _ in kinds):
        return math.inf
    require_accounting()
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
    from dp_accounting.pld import PLDAccountant

    accountant = PLDAccountant(value_discretization_interval=_DISCRETIZATION)
    for rate, noise, steps in kinds:
        accountant.compose(SelfComposedDpEvent(PoissonSampledDpEvent(rate, GaussianDpEvent(noise)), steps))
    return float(accountant.get_epsilon(delta))


@cache
def noise_for(epsilon: float, delta: float, sampling_rate: float, steps: int) -> float:
    """Return the least noise multiplier, in three digits, with which so many steps stay within epsilon.

    Raises:
        UserError: no noise that can be drawn is enough.
    """
    from scipy.optimize import brentq  # here: it takes long to load, and most commands need none

    def excess(log_noise: float) -> float:
        found = epsilon_of([Spending(sampling_rate, math.exp(log_noise), steps)], delta)
        return math.log(min(max(found, _LEAST_EPSILON), 2 * _MOST_LOSS) / epsilon)

    if excess(math.log(_MOST_NOISE)) > 0:
        raise UserError(
            f"privacy.epsilon = {epsilon:g}: no noise up to {_MOST_NOISE:g} times the clip norm is enough "
            f"for {steps:,} steps with delta = {delta:g}; allow more, or take fewer steps"
        )
    low = high = 0.0
    while excess(high) > 0:
        low, high = high, high + math.log(2)
    while excess(low) <= 0:
        low, high = low - math.log(2), low
    found: float = brentq(excess, low, high, xtol=_PRECISION)  # in logarithms it is nearly a line
    while excess(found) > 0:
        found += _PRECISION
    return math.exp(found)
