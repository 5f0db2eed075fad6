"""The statistics of an attack, and an attack on clip and noise themselves, as clients use them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from fedflame.privacy.audit import attack, p_value, proved_epsilon
from fedflame.privacy.clipping import add_clipped
from fedflame.privacy.noise import Noise

TRIES, WIDTH, CLIP = 20_000, 7, 2.0


def reads(sigma: float, claimed: float, with_row: bool, secret: bytes) -> np.ndarray:
    """Noised sums of many steps, along the gradient of a row that is far longer than the clip norm."""
    row = torch.linspace(-3, 5, WIDTH) * 40
    sums = {"A": torch.zeros(WIDTH)}
    if with_row:
        add_clipped(sums, {"A": row}, CLIP)
    many = {"A": sums["A"].expand(TRIES, WIDTH)}
    noised = Noise(secret, ("run",)).added_to(many, sigma * CLIP, 0)["A"]
    return (noised @ (row / row.norm())).numpy()


def proved_mu(without: np.ndarray, with_row: np.ndarray) -> float:
    """What separates them at least, at 95 % (Clopper and Pearson), by a threshold between the two means."""
    threshold = (without.mean() + with_row.mean()) / 2

    def most(wrong: int) -> float:
        return float(stats.beta.ppf(0.975, wrong + 1, TRIES - wrong))

    false, missed = most(int((without > threshold).sum())), most(int((with_row <= threshold).sum()))
    return float(stats.norm.ppf(1 - false) - stats.norm.ppf(missed))


def test_the_mechanism_separates_a_row_as_far_as_its_noise_says_and_half_the_noise_is_found_out() -> None:
    sigma = 0.8
    for scale, holds in ((1.0, True), (0.5, False)):
        without, with_row = (
            reads(scale * sigma, sigma, there, bytes([there] * 32)) for there in (False, True)
        )
        mu = proved_mu(without, with_row)
        assert (0.9 / sigma < mu <= 1 / sigma) == holds, (scale, mu)
        assert holds or mu > 1.8 / sigma


def test_the_chance_of_right_guesses_is_that_of_fair_coins_without_epsilon() -> None:
    assert p_value(100, 10, 8, 0.0, 0.0) == pytest.approx(sum(math.comb(10, i) for i in (8, 9, 10)) / 1024)
    # With delta, theorem 5.2 by hand: the largest of the means of the tails below, times 2 m delta.
    tail = sum(math.comb(10, i) for i in (8, 9, 10)) / 1024
    below = [sum(math.comb(10, i) for i in range(8 - s, 8)) / 1024 / s for s in range(1, 9)]
    assert p_value(100, 10, 8, 0.0, 1e-3) == pytest.approx(tail + 2 * 100 * 1e-3 * max(below))


def test_more_epsilon_makes_right_guesses_likelier_up_to_all() -> None:
    chances = [p_value(400, 40, 36, epsilon, 1e-5) for epsilon in (0.0, 1.0, 2.0, 4.0, 8.0)]
    assert chances == sorted(chances) and chances[0] < 1e-3 and chances[-1] > 0.9


def test_scores_that_tell_everything_prove_much_and_those_that_tell_nothing_nothing() -> None:
    draw = np.random.default_rng(0)
    inside = draw.random(400) < 0.5
    known, guessed = inside + 0.1 * draw.random(400), draw.random(400)
    assert proved_epsilon(known, inside, 1e-5) > 3
    assert proved_epsilon(guessed, inside, 1e-5) == 0
    found = attack(known, inside, 1e-5)
    assert (found.canaries, found.auc, found.true_positives) == (400, 1.0, 1.0)
    assert abs(attack(guessed, inside, 1e-5).auc - 0.5) < 0.06


def test_scores_in_reverse_prove_nothing_and_equal_scores_are_a_guess() -> None:
    inside = np.arange(200) % 2 == 0
    assert proved_epsilon(-inside.astype(float), inside, 1e-5) == 0
    assert attack(np.zeros(200), inside, 1e-5).auc == 0.5


@pytest.mark.parametrize("epsilon", [1.0, 3.0])
def test_randomized_response_is_not_refuted_at_its_epsilon_and_is_nearly_found(epsilon: float) -> None:
    """The mechanism for which the theorem is tight: it tells each coin, and lies now and then."""
    draw = np.random.default_rng(1)
    inside = draw.random(20_000) < 0.5
    honest = draw.random(20_000) < 1 / (1 + math.exp(-epsilon))
    told = np.where(honest, inside, ~inside) + 0.01 * draw.random(20_000)
    assert 0.85 * epsilon < proved_epsilon(told, inside, 0.0) <= epsilon
