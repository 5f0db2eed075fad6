"""Whose turn it is to train with which k."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedflame.config.k_rotation import KRotation, experts_of_round

budgets = st.lists(st.sampled_from((1, 2, 3, 4, 8)), min_size=1, max_size=12)


@pytest.mark.parametrize(
    ("rotation", "rounds"),
    [
        ("none", [[8, 4, 2, 8, 1], [8, 4, 2, 8, 1], [8, 4, 2, 8, 1]]),
        # Clients 0 and 3 go through 8, 4, 8, 2, 8, 1, client 1 through 4, 2, 4, 1, client 2 through 2, 1.
        # In order of k they are 0, 3, 1, 2, and each begins one turn later.
        ("smaller", [[8, 4, 1, 4, 1], [4, 1, 2, 8, 1], [8, 4, 1, 2, 1]]),
        # Clients 0 and 3 as before, client 1 through 4, 8, 4, 2, 4, 1, client 2 through 2, 8, 2, 4, 2, 1.
        ("all", [[8, 4, 4, 4, 1], [4, 2, 2, 8, 1], [8, 4, 1, 2, 1]]),
    ],
)
def test_three_rounds_by_hand(rotation: KRotation, rounds: list[list[int]]) -> None:
    for number, wanted in enumerate(rounds, start=1):
        assert experts_of_round([8, 4, 2, 8, 1], rotation, number) == wanted


@given(afforded=budgets, rotation=st.sampled_from(("smaller", "all")))
def test_half_of_the_turns_are_at_what_a_client_affords_and_the_others_at_each_other_k(
    afforded: list[int], rotation: KRotation
) -> None:
    cycle = 2 * 12  # a multiple of twice 1 to 4 other k
    rounds = [experts_of_round(afforded, rotation, number) for number in range(1, cycle + 1)]
    for client, k in enumerate(afforded):
        turns = Counter(chosen[client] for chosen in rounds)
        other = {other for other in afforded if other < k}
        if rotation == "all" and k > min(afforded):
            other = {*afforded} - {k}
        between = {turn: cycle // 2 // len(other) for turn in other}
        assert turns == {k: cycle // 2 if other else cycle} | between


@given(budgets, st.integers(1, 9))
def test_clients_that_afford_the_same_share_the_turns_evenly_in_every_round(
    afforded: list[int], round_number: int
) -> None:
    chosen = experts_of_round(afforded, "smaller", round_number)
    for k in {*afforded} - {min(afforded)}:
        own = [mine == k for mine, budget in zip(chosen, afforded, strict=True) if budget == k]
        assert abs(2 * sum(own) - len(own)) <= 1
