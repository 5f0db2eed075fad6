"""What the limits of a site's file refuse of rows, tokens and time, and that it costs the site nothing."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from tests.tiny_models import TOP_K
from tests.trainer_asked import LIMITS, RUN, Make, Told, request

from fedflame.messages import RoundPlan
from fedflame.trainer.job import TrainingJob
from fedflame.wire.codec import encode_plan
from fedflame.wire.envelope import Envelope


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        ("max_rank = 2", "the plan asks for rank = 3; this site allows at most 2"),
        ("max_memory = 1e-6", "GB of memory; this site allows at most 1e-06 GB"),
        ("min_rows_per_update = 7", "the update would be of 6 rows; this site asks for at least 7"),
    ],
)
def test_a_rank_memory_or_few_rows_that_the_site_does_not_allow_are_refused_before_anything_is_loaded(
    limits: str, reason: str, make_service: Make, job: TrainingJob, plan: RoundPlan, told: Told
) -> None:
    answer = make_service(LIMITS + limits).answer(request(job, plan))
    assert answer.header["kind"] == "refused" and reason in answer.header["reason"]
    assert not told.heard("loading") and not told.heard("training")


@pytest.mark.parametrize("rows", [6, 7])
def test_a_site_that_asks_for_more_rows_than_were_trained_on_sends_nothing(
    rows: int, make_service: Make, job: TrainingJob, plan: RoundPlan
) -> None:
    """By its steps a plan has room for eight rows; the last batch of the seven is smaller."""
    service = make_service(LIMITS + f"min_rows_per_update = {rows}")
    answer = service.answer(request(job, replace(plan, max_steps=4)))
    assert answer.header["kind"] == "update"
    by_tokens = service.answer(request(job, replace(plan, max_steps=1, tokens_per_step=60)))
    assert by_tokens.header["kind"] == "refused" and not by_tokens.body
    assert "rows; this site asks for at least" in by_tokens.header["reason"]


def test_a_site_that_asks_for_more_tokens_than_were_trained_on_sends_nothing(
    make_service: Make, job: TrainingJob, plan: RoundPlan
) -> None:
    tokens = make_service().answer(request(job, plan)).header["tokens"]
    enough = make_service(LIMITS + f"min_tokens_per_update = {tokens}")
    assert enough.answer(request(job, replace(plan, update_dtype="bfloat16"))).header["kind"] == "update"
    service = make_service(LIMITS + f"min_tokens_per_update = {tokens + 1}")
    answer = service.answer(request(job, replace(plan, update_dtype="int8")))
    assert answer.header["kind"] == "refused" and not answer.body
    assert answer.header["reason"] == (
        f"the update would be of {tokens} tokens; this site asks for at least {tokens + 1}"
    )


def test_a_round_that_takes_too_long_is_stopped_between_steps_and_the_next_plan_is_trained(
    make_service: Make, job: TrainingJob, plan: RoundPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    service, steps = make_service(LIMITS + "max_seconds_per_round = 5"), list[int]()
    clock = [100.0]
    from fedflame.trainer import limits as module

    known = module.time_limit

    def noted(limits: Any) -> Callable[[int], None]:
        on_step = known(limits)

        def step(tokens: int) -> None:
            clock[0] += 2
            steps.append(tokens)
            on_step(tokens)

        return step

    monkeypatch.setattr("fedflame.trainer.limits.time.monotonic", lambda: clock[0])
    monkeypatch.setattr("fedflame.trainer.work.time_limit", noted)
    long = service.answer(request(job, replace(plan, max_steps=50)))
    assert long.header["kind"] == "refused" and not long.body
    assert long.header["reason"] == "the round takes longer than the 5 s that this site allows"
    assert len(steps) == 3
    monkeypatch.undo()
    answer = service.answer(request(job, replace(plan, max_steps=2)))
    fresh = make_service().answer(request(job, replace(plan, max_steps=2), run="cd" * 16))
    assert answer.header["kind"] == "update" and answer.body == fresh.body, "nothing of it is left"


@pytest.mark.slow
def test_while_a_round_trains_another_request_is_answered_and_after_its_time_the_next_is_trained(
    make_service: Make, job: TrainingJob, plan: RoundPlan, told: Told
) -> None:
    service, answers = make_service(LIMITS + "max_seconds_per_round = 3"), list[Envelope]()
    endless = request(job, replace(plan, max_steps=10_000))
    thread = threading.Thread(target=lambda: answers.append(service.answer(endless)))
    thread.start()
    while not told.heard("training with"):
        time.sleep(0.01)
    describe = Envelope({"kind": "describe", "ticket": "t", "run": RUN, "site": "north"})
    assert service.answer(describe).header["kind"] == "description"
    answered = service.answer(request(job, replace(plan, max_steps=1)))
    assert answered.header["kind"] == "update", answered.header
    thread.join(30)
    assert answers[0].header["kind"] == "refused" and "takes longer" in answers[0].header["reason"]


def test_the_limits_of_a_site_leave_what_it_sends_as_it_was(
    make_service: Make, job: TrainingJob, plan: RoundPlan
) -> None:
    limits = (
        "max_rank = 3\nmax_memory = 1.0\nmax_seconds_per_round = 600\nmax_rounds_per_day = 9\nmax_runs = 9\n"
        "min_rows_per_update = 5\nmin_tokens_per_update = 5\nmax_update_norm = 1000.0\n"
    )
    plain = make_service().answer(request(job, plan))
    limited = make_service(LIMITS + limits, TOP_K).answer(request(job, plan, run="cd" * 16))
    assert limited.body == plain.body and encode_plan(plan)
