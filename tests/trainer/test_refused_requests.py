"""Requests that a site's file or no trainer allows: refused in a line, before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from tests.trainer_asked import LIMITS, Told, request

from fedflame.messages import RoundPlan
from fedflame.trainer.job import TrainingJob
from fedflame.trainer.service import TrainerService
from fedflame.trainer.site import load_site
from fedflame.wire.codec import encode_plan
from fedflame.wire.envelope import Envelope


@pytest.mark.parametrize(
    ("limits", "k", "change", "reason"),
    [
        ("", 1, {}, "the plan asks for k = 2; this site allows at most 1"),
        ("max_rounds = 4", 4, {}, "the plan asks for rounds = 5; this site allows at most 4"),
        ("max_rounds = 5", 4, {"round": 6}, "the plan asks for round = 6; this site allows at most 5"),
        ("max_steps = 2", 4, {}, "the plan asks for steps = 3; this site allows at most 2"),
        ("max_tokens = 191", 4, {}, "the plan asks for tokens = 192; this site allows at most 191"),
        ("max_tokens = 191", 4, {"tokens_per_step": 100}, "tokens = 300; this site allows at most 191"),
        ("max_tokens = 239", 4, {"packed_length": 40}, "tokens = 240; this site allows at most 239"),
        ("max_flops = 1e3", 4, {}, "FLOPs; this site allows at most 1e+03"),
    ],
)  # fmt: skip
def test_more_work_than_the_sites_file_allows_is_refused_before_anything_is_loaded(
    limits: str, k: int, change: dict[str, int], reason: str,
    make_service: Callable[..., TrainerService], job: TrainingJob, plan: RoundPlan, told: Told,
) -> None:  # fmt: skip
    answer = make_service(LIMITS + limits, k).answer(request(job, replace(plan, **change)))
    assert answer.header["kind"] == "refused"
    assert reason in answer.header["reason"]
    assert not told.heard("loading")
    assert told.heard("refused: ")


def test_a_plan_that_asks_for_just_what_is_allowed_is_trained(
    make_service: Callable[..., TrainerService], job: TrainingJob, plan: RoundPlan
) -> None:
    flops = 192 * make_service()._work.flops_per_token(job, plan)
    limits = f"max_rounds = 5\nmax_steps = 3\nmax_tokens = 192\nmax_flops = {flops!r}"
    service = make_service(LIMITS + limits, k=2)
    assert service.answer(request(job, replace(plan, round=5))).header["kind"] == "update"


def test_a_token_of_a_long_packed_sequence_costs_more_than_one_of_a_row(
    make_service: Callable[..., TrainerService], job: TrainingJob, plan: RoundPlan
) -> None:
    packed = replace(plan, packed_length=1000)
    flops = 6000 * make_service()._work.flops_per_token(job, plan)
    answer = make_service(LIMITS + f"max_flops = {flops!r}").answer(request(job, packed))
    assert answer.header["kind"] == "refused" and "FLOPs" in answer.header["reason"]


def test_a_larger_k_is_trained_where_the_owner_allows_it(
    make_service: Callable[..., TrainerService], job: TrainingJob, plan: RoundPlan
) -> None:
    service = make_service(k=1)
    assert "k = 2; this site allows at most 1" in service.answer(request(job, plan)).header["reason"]
    path = service._site.folder / "site.toml"
    path.write_text(
        path.read_text().replace("active_experts = 1", "active_experts = 1\nmax_active_experts = 2")
    )
    allowing = TrainerService(load_site(path), lambda _: None)
    assert allowing.answer(request(job, plan)).header["kind"] == "update"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_name_or_path": "another"}, "model 'another' is not allowed here; the-model may be trained"),
        ({"model_digest": "0" * 32}, "model 'the-model' is another one here"),
    ],
)
def test_a_model_that_is_not_allowed_or_not_the_same_is_refused(
    changes: dict[str, str], reason: str,
    make_service: Callable[..., TrainerService], job: TrainingJob, plan: RoundPlan, told: Told,
) -> None:  # fmt: skip
    answer = make_service().answer(request(job.model_copy(update=changes), plan))
    assert answer.header["kind"] == "refused"
    assert reason in answer.header["reason"]
    assert told.heard(f"refused: {answer.header['reason']}") and not told.heard("loading")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"site": "south"}, "this is north; the request is for south"),
        ({"run": "../../etc"}, "run is '../../etc'; 32 hexadecimal digits are needed"),
        ({"kind": "delete"}, "request of kind 'delete'; describe, train, evaluate and sum are known"),
        ({"kind": 3}, "field kind is 3; a string is needed"),
        ({"job": None}, "job = None: Input should be"),
        ({"job": {"r": "8"}}, "job.model_name_or_path is missing"),
    ],
)
def test_a_request_that_is_none_is_refused(
    changes: dict[str, Any], reason: str,
    make_service: Callable[..., TrainerService], job: TrainingJob, plan: RoundPlan,
) -> None:  # fmt: skip
    answer = make_service().answer(request(job, plan, **changes))
    assert (answer.header["kind"], answer.header["site"], answer.body) == ("refused", "north", b"")
    assert reason in answer.header["reason"]


def test_a_plan_that_is_none_is_refused_and_one_that_does_not_fit_fails(
    make_service: Callable[..., TrainerService], job: TrainingJob, plan: RoundPlan
) -> None:
    service = make_service()
    garbage = Envelope(request(job, plan).header, b"garbage")
    assert service.answer(garbage).header["reason"] == "7 bytes that are no fedflame message"
    tampered = Envelope(garbage.header, encode_plan(plan)[:-1] + b"x")
    assert "its checksum is wrong" in service.answer(tampered).header["reason"]
    larger = service.answer(request(job, replace(plan, adapter=plan.adapter.with_rank(job.r + 1))))
    assert larger.header["reason"] == "the plan has rank 4; its job says r = 3"
    misfit = service.answer(request(job, replace(plan, adapter=replace(plan.adapter, attention={}))))
    assert misfit.header["kind"] == "failed" and "is missing; the model needs" in misfit.header["reason"]
    smaller = service.answer(request(job, replace(plan, adapter=plan.adapter.with_rank(job.r - 1))))
    assert smaller.header["kind"] == "update", "some methods give a client fewer ranks"
    other = service.answer(request(job.model_copy(update={"target_modules": "nonsense"}), plan))
    assert other.header["kind"] == "failed"
    assert service.answer(request(job, plan)).header["kind"] == "update", "it goes on after both"
