"""The memory that a round may take at a site: counted before it is taken, with all that it holds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from tests.trainer_asked import LIMITS, ROWS, Make, Told, request

from fedflame.base.device import Card, DeviceChoice
from fedflame.base.files import model_config_path
from fedflame.cost.memory import held_base_bytes, least_training_memory, training_memory
from fedflame.cost.model_shape import read_model_shape
from fedflame.messages import EvaluationPlan, RoundPlan
from fedflame.trainer.job import TrainingJob
from fedflame.trainer.limits import memory_needed, scoring_memory_needed
from fedflame.wire.codec import encode_plan


def test_merged_factors_count_in_the_memory_of_a_round(
    make_service: Make, job: TrainingJob, plan: RoundPlan, told: Told
) -> None:
    service = make_service(LIMITS + "max_memory = 1e-3")
    assert service.answer(request(job, plan)).header["kind"] == "update"
    told.clear()
    heavy = replace(plan, merged=plan.adapter.with_rank(1000))
    assert len(encode_plan(heavy)) > 1e6
    answer = service.answer(request(job, heavy))
    assert answer.header["kind"] == "refused" and "GB of memory" in answer.header["reason"]
    assert not told.heard("training")


@pytest.mark.slow
def test_a_step_that_takes_too_much_memory_is_refused_before_it_is_taken(
    make_service: Make, job: TrainingJob, plan: RoundPlan, tiny_folder: Path, told: Told
) -> None:
    """Not more than the rows that there are, however large the batch is."""
    shape = read_model_shape(model_config_path(str(tiny_folder)))
    service = make_service()
    assert service.answer(request(job, plan)).header["kind"] == "update"
    ready = service._work._model.ready
    assert ready is not None
    lengths = [len(row.ids) for row in ready.rows]
    longest, every = max(lengths), sum(lengths)

    def needed(tokens: int, masked: int = 0) -> float:
        setting = (shape, plan.active_experts, job.r, ("q_proj",), tokens, "float32", 1.0, "none", masked)
        activations = training_memory(*setting).activations  # type: ignore[arg-type]
        return (least_training_memory(shape, job.r, ("q_proj",), "float32") + activations) / 1e9

    for changes, tokens, masked in (
        ({"batch_size": 2}, 2 * longest, 0),
        ({"batch_size": 1000}, ROWS * longest, 0),
        ({"tokens_per_step": 40}, 40, 0),
        ({"tokens_per_step": 1}, longest, 0),
        ({"batch_size": 2, "padding_free": True}, 2 * job.max_length, 2 * job.max_length),
        ({"batch_size": 1000, "padding_free": True}, every, every),
        ({"batch_size": 2, "packed_length": 40}, 80, 40),
        ({"batch_size": 1, "packed_length": 10_000}, every, every),
        ({"batch_size": 1000, "packed_length": 40}, ROWS * 40, 40),
        ({"batch_size": 1000, "packed_length": 40, "padding_free": True}, every, every),
    ):
        asked = request(job, replace(plan, round=3, **changes))
        just = make_service(LIMITS + f"max_memory = {needed(tokens, masked) + 1e-9!r}")
        assert just.answer(asked).header["kind"] == "update", changes
        less = make_service(LIMITS + f"max_memory = {needed(tokens, masked) - 1e-9!r}")
        again = request(job, replace(plan, round=4, **changes))
        assert less.answer(again).header["kind"] == "refused", changes
    too_little = make_service(LIMITS + f"max_memory = {needed(2 * longest) - 1e-9!r}")
    told.clear()
    answer = too_little.answer(request(job, replace(plan, round=4)))
    assert answer.header["kind"] == "refused" and "GB of memory" in answer.header["reason"]
    assert told.heard("loading") and not told.heard("trained in")


def test_the_longest_request_is_a_quarter_of_the_memory(
    make_service: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert make_service(LIMITS + "max_memory = 4e-6").longest_request == 1000
    monkeypatch.setattr("fedflame.trainer.service.memory_limit", lambda: 8000)
    assert make_service().longest_request == 2000
    monkeypatch.setattr("fedflame.trainer.service.memory_limit", lambda: 1 << 50)
    assert make_service().longest_request == 8 << 30


def test_on_a_cpu_a_round_may_take_the_memory_that_there_is(
    make_service: Make, job: TrainingJob, plan: RoundPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedflame.trainer.limits.memory_limit", lambda: 1000)
    answer = make_service().answer(request(job, plan))
    assert answer.header["kind"] == "refused"
    assert answer.header["reason"].endswith("GB of memory; this site allows at most 1e-06 GB")


def test_a_base_that_is_mapped_from_files_takes_no_memory(
    make_service: Make, job: TrainingJob, plan: RoundPlan, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = read_model_shape(model_config_path(str(tiny_folder)))
    service = make_service()
    assert service.answer(request(job, plan, run="cd" * 16)).header["kind"] == "update"
    ready = service._work._model.ready
    assert ready is not None
    tokens = 2 * max(len(row.ids) for row in ready.rows)
    whole = training_memory(shape, plan.active_experts, job.r, ("q_proj",), tokens, "float32")
    least = least_training_memory(shape, job.r, ("q_proj",), "float32")
    limits = LIMITS + f"max_memory = {(least + whole.activations - whole.base / 2) / 1e9!r}"
    assert make_service(limits).answer(request(job, plan)).header["kind"] == "refused"
    monkeypatch.setattr("fedflame.trainer.limits.is_short_of_memory", lambda size: True)
    assert make_service(limits).answer(request(job, plan)).header["kind"] == "update"


def test_a_base_takes_memory_unless_it_is_mapped_which_none_on_a_card_is(
    job: TrainingJob, plan: RoundPlan, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = read_model_shape(model_config_path(str(tiny_folder)))
    scoring = EvaluationPlan(2, 1, 2, plan.rescaler_values, plan.adapter)
    cpu = DeviceChoice("cpu", "")
    card = DeviceChoice("cuda:0", "", (Card("cuda:0", "a card", 10**10, (9, 0)),))

    def more_on_a_card() -> tuple[int, int]:
        training = [memory_needed(shape, job, plan, 40, "none", device) for device in (cpu, card)]
        evaluation = [scoring_memory_needed(shape, job, scoring, device) for device in (cpu, card)]
        return training[1] - training[0], evaluation[1] - evaluation[0]

    base = held_base_bytes(shape, job.r, job.dtype)
    monkeypatch.setattr("fedflame.trainer.limits.is_short_of_memory", lambda size: False)
    assert more_on_a_card() == (0, 0)
    monkeypatch.setattr("fedflame.trainer.limits.is_short_of_memory", lambda size: True)
    assert more_on_a_card() == (base, base)
