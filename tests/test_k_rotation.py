"""Whose turn it is to train with which k."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedflame.k_rotation import KRotation, experts_of_round

rotations: list[KRotation] = ["none", "min", "all"]
budgets = st.lists(st.sampled_from((1, 2, 3, 4, 8)), min_size=1, max_size=12)


@pytest.mark.parametrize(
    ("rotation", "rounds"),
    [
        ("none", [[8, 4, 2, 8, 1], [8, 4, 2, 8, 1], [8, 4, 2, 8, 1]]),
        # In order of k: clients 0 and 3 (k = 8), 1 (k = 4), 2, 4 (k = 1); every second one begins at 1.
        ("min", [[8, 4, 1, 1, 1], [1, 1, 2, 8, 1], [8, 4, 1, 1, 1]]),
        ("all", [[8, 1, 1, 4, 1], [4, 4, 2, 2, 1], [2, 2, 1, 1, 1]]),
    ],
)
def test_three_rounds_by_hand(rotation: KRotation, rounds: list[list[int]]) -> None:
    for number, wanted in enumerate(rounds, start=1):
        assert experts_of_round([8, 4, 2, 8, 1], rotation, number) == wanted


@pytest.mark.parametrize("rotation", rotations)
@given(afforded=budgets)
def test_over_the_rounds_of_a_cycle_each_turn_comes_equally_often(
    rotation: KRotation, afforded: list[int]
) -> None:
    cycle = 60  # a multiple of 1 to 5 turns
    rounds = [experts_of_round(afforded, rotation, number) for number in range(1, cycle + 1)]
    for client, k in enumerate(afforded):
        turns = Counter(chosen[client] for chosen in rounds)
        wanted = {
            "none": {k},
            "min": {k, min(afforded)},
            "all": {other for other in afforded if other <= k},
        }[rotation]
        assert turns == dict.fromkeys(wanted, cycle // len(wanted))


@given(budgets, st.integers(1, 9))
def test_clients_that_afford_the_same_share_the_turns_evenly_in_every_round(
    afforded: list[int], round_number: int
) -> None:
    chosen = experts_of_round(afforded, "min", round_number)
    for k in {*afforded} - {min(afforded)}:
        own = [mine == k for mine, budget in zip(chosen, afforded, strict=True) if budget == k]
        assert abs(2 * sum(own) - len(own)) <= 1
