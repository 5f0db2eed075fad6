"""How long a site is waited for; every number here is worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tests.message_samples import a_plan

from fedflame.engines.patience import Patience, Taken, learned_wait
from fedflame.wire.codec import encode_plan, encoded_plan_work


@pytest.mark.parametrize(
    ("taken", "work", "seconds"),
    [
        ([], 8, 600),  # what every site has
        ([Taken(8, 100)], 8, 600),  # 3 x 100 is less than that
        ([Taken(8, 400)], 8, 1200),
        ([Taken(8, 400), Taken(8, 700), Taken(8, 500)], 8, 2100),  # by the slowest
        ([Taken(8, 400)], 32, 4800),  # four times the work
        ([Taken(8, 400)], 2, 1200),  # no less for less work
        ([Taken(32, 900), Taken(2, 300)], 16, 7200),  # 8 x 300 x 3, more than 900 x 3
    ],
)
def test_three_times_the_slowest_for_as_much_work_and_ten_minutes_at_least(
    taken: list[Taken], work: float, seconds: float
) -> None:
    assert learned_wait(taken, work) == seconds


def test_a_site_counts_by_its_own_answers() -> None:
    patience = Patience()
    patience.heard("fast", 8, 250)
    patience.heard("slow", 8, 1000)
    patience.heard("slow", 8, 900)
    assert (patience.wait("fast", 8), patience.wait("slow", 8)) == (750, 3000)


def test_a_site_that_never_answered_is_waited_for_once_and_then_by_the_others() -> None:
    patience = Patience()
    patience.heard("fast", 8, 250)
    patience.heard("slow", 8, 1000)
    assert patience.wait("silent", 8) is None
    patience.missed("silent")
    assert patience.wait("silent", 8) == 3000
    patience.heard("silent", 8, 5000)  # too late, but it is there
    assert patience.wait("silent", 8) == 15000


def test_the_work_of_a_plan_is_its_steps_times_its_experts() -> None:
    plan = replace(a_plan(), active_experts=2, max_steps=7)
    assert encoded_plan_work(encode_plan(plan)) == 14
