from __future__ import annotations

import math

import pytest
from prv_accountant.dpsgd import DPSGDAccountant
from scipy.stats import norm

from fedflame.errors import UserError
from fedflame.privacy import accounting
from fedflame.privacy.accounting import Spending, epsilon_of, noise_for

DELTA = 1e-5


def rdp_epsilon(spent: Spending, delta: float) -> float:
    """Of whole orders in closed form, a looser bound (Mironov et al., arXiv 1908.10530, section 3.3).

    The way from RDP to epsilon is that of Canonne et al., arXiv 2004.00010, proposition 12.
    """
    q, noise, steps = spent.sampling_rate, spent.noise_multiplier, spent.steps
    found = []
    for order in range(2, 64):
        terms = [
            math.log(math.comb(order, i))
            + (order - i) * math.log1p(-q)
            + i * math.log(q)
            + (i * i - i) / (2 * noise**2)
            for i in range(order + 1)
        ]
        largest = max(terms)
        moment = largest + math.log(sum(math.exp(term - largest) for term in terms))
        rdp = steps * moment / (order - 1)
        found.append(rdp + math.log1p(-1 / order) - math.log(delta * order) / (order - 1))
    return min(found)


def gaussian_delta(epsilon: float, noise: float, steps: int) -> float:
    """Of the unsampled Gaussian mechanism, exactly (Balle and Wang, arXiv 1805.06530, theorem 8)."""
    mu = math.sqrt(steps) / noise
    return float(norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * norm.cdf(-mu / 2 - epsilon / mu))


@pytest.mark.parametrize(
    "spent", [Spending(0.0853, 0.69, 30), Spending(0.01, 0.8, 500), Spending(0.3, 3, 60)]
)
def test_epsilon_is_below_a_looser_bound_in_closed_form_and_not_far_below(spent: Spending) -> None:
    loose = rdp_epsilon(spent, DELTA)
    assert 0.7 * loose < epsilon_of([spent], DELTA) < loose


def test_without_sampling_epsilon_is_that_of_the_exact_formula() -> None:
    epsilon = epsilon_of([Spending(1.0, 5.0, 40)], DELTA)
    assert gaussian_delta(epsilon, 5.0, 40) == pytest.approx(DELTA, rel=0.02)


@pytest.mark.parametrize(
    "spent",
    [Spending(0.02, 1.0, 300), Spending(0.1, 1.5, 100), Spending(0.16, 4.0, 60), Spending(1.0, 5.0, 10)],
)
def test_epsilon_is_that_of_another_library(spent: Spending) -> None:
    """prv-accountant, which composes by another method (Gopi et al., arXiv 2106.02848)."""
    other = DPSGDAccountant(spent.noise_multiplier, spent.sampling_rate, spent.steps, 0.01, 1e-9)
    _, epsilon, _ = other.compute_epsilon(DELTA, spent.steps)
    assert epsilon_of([spent], DELTA) == pytest.approx(epsilon, rel=0.01)


def test_rounds_compose_as_their_steps_in_one_and_kinds_add_up() -> None:
    rounds = [Spending(0.1, 1.0, 10)] * 3
    assert epsilon_of(rounds, DELTA) == epsilon_of([Spending(0.1, 1.0, 30)], DELTA)
    both = epsilon_of([*rounds, Spending(0.2, 2.0, 10)], DELTA)
    assert (
        epsilon_of(rounds, DELTA)
        < both
        < epsilon_of(rounds, DELTA) + epsilon_of([Spending(0.2, 2.0, 10)], DELTA)
    )


def test_nothing_spent_is_nothing_and_no_noise_has_no_bound() -> None:
    assert epsilon_of([], DELTA) == 0 == epsilon_of([Spending(0.1, 1.0, 0)], DELTA)
    assert epsilon_of([Spending(0.1, 1.0, 5), Spending(0.1, 0.01, 1)], DELTA) == math.inf


@pytest.mark.parametrize("epsilon", [1.0, 8.0])
def test_the_noise_for_an_epsilon_is_enough_and_hardly_more(epsilon: float) -> None:
    noise = noise_for(epsilon, DELTA, 0.1, 50)
    assert epsilon_of([Spending(0.1, noise, 50)], DELTA) <= epsilon
    assert epsilon_of([Spending(0.1, noise / 1.01, 50)], DELTA) > epsilon


def test_an_epsilon_that_no_noise_reaches_is_refused() -> None:
    with pytest.raises(UserError, match="allow more, or take fewer steps"):
        noise_for(1e-6, 1e-9, 1.0, 1_000_000)


def test_without_the_package_a_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accounting, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"install fedflame\[privacy\]"):
        accounting.require_accounting()
