"""What a site does about its own updates: how long they may be, and what they tell of loss and counts."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.trainer_asked import LIMITS, Make, request

from fedflame.messages import RoundPlan
from fedflame.trainer.job import TrainingJob
from fedflame.trainer.service import TrainerService
from fedflame.training.update_norm import update_norm
from fedflame.wire.codec import decode_update


def learned(service: TrainerService, job: TrainingJob, plan: RoundPlan) -> Any:
    answer = service.answer(request(job, plan))
    assert answer.header["kind"] == "update", answer.header
    return decode_update(answer.body, plan)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_no_update_is_longer_than_the_site_allows_whatever_the_plan_says(
    dtype: Any, make_service: Make, job: TrainingJob, plan: RoundPlan
) -> None:
    fierce = replace(plan, learning_rate=3.0, update_dtype=dtype, error_feedback=dtype != "float32")
    free = learned(make_service(), job, replace(fierce, round=1))
    assert update_norm(free, fierce) > 10
    service = make_service(LIMITS + "max_update_norm = 0.5")
    for number in (2, 3, 4):  # what rounding took from one is added to the next
        asked = replace(fierce, round=number)
        bound = learned(service, job, asked)
        assert 0.48 < update_norm(bound, asked) <= 0.5
    first = learned(make_service(LIMITS + "max_update_norm = 0.5"), job, replace(fierce, round=1, seed=6))
    assert not torch.equal(first.rescaler_values, fierce.rescaler_values), "the rescaler is scaled, not lost"


def test_an_update_that_is_short_enough_is_sent_as_it_is(
    make_service: Make, job: TrainingJob, plan: RoundPlan
) -> None:
    plain = make_service().answer(request(job, plan)).body
    update = decode_update(plain, plan)
    limits = LIMITS + f"max_update_norm = {1.0001 * update_norm(update, plan)}"
    assert make_service(limits).answer(request(job, plan, run="cd" * 16)).body == plain


def test_the_norm_is_that_of_all_values_and_of_the_rescalers_steps(plan: RoundPlan) -> None:
    from fedflame.messages import ClientUpdate

    ones = plan.adapter.combine(plan.adapter, lambda value, _: torch.ones_like(value))
    values = sum(value.numel() for value in ones.tensors().values())
    update = ClientUpdate(
        round=2, client=1, active_experts=2, delta=ones, rescaler_values=plan.rescaler_values - 2,
        counts=torch.ones(2, 4, dtype=torch.int64), tokens=2, num_examples=1, trained_examples=1, steps=1,
        loss=1.0,
    )  # fmt: skip
    layers = len(plan.rescaler_values)
    assert update_norm(update, plan) == pytest.approx(math.sqrt(values + 4 * layers), rel=1e-12)


@pytest.mark.parametrize("disclosure", ["exact", "rounded", "withheld"])
def test_a_site_tells_of_loss_and_counts_what_its_file_says(
    disclosure: str, make_service: Make, job: TrainingJob, plan: RoundPlan
) -> None:
    from fedflame.server.validation import validate_update

    exact = learned(make_service(), job, plan)
    told = learned(
        make_service(LIMITS + f'disclosure = "{disclosure}"'), job, replace(plan, weight_decay=1e-30)
    )
    validate_update(told, plan, job.max_length)
    assert torch.equal(told.counts > 0, exact.counts > 0)
    if disclosure == "exact":
        assert told.loss == exact.loss and torch.equal(told.counts, exact.counts)
    elif disclosure == "rounded":
        assert told.loss == round(exact.loss, 1) != exact.loss
    else:
        assert told.loss is None
        for layer in told.counts.tolist():
            used = [count for count in layer if count]
            assert max(used) - min(used) <= 1
    values = told.delta.tensors()
    assert all(torch.allclose(values[name], value) for name, value in exact.delta.tensors().items())
