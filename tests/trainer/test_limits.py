"""What the limits of a site's file refuse, and that it costs the site nothing."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny_models import TOP_K
from tests.trainer_asked import ROWS, RUN, Told, request

from fedflame.base.device import Card, DeviceChoice
from fedflame.base.files import model_config_path
from fedflame.cost import refused_families
from fedflame.cost.memory import held_base_bytes, least_training_memory, training_memory
from fedflame.cost.model_shape import read_model_shape
from fedflame.cost.refused_families import NOT_PACKABLE
from fedflame.data.templates import Template
from fedflame.messages import EvaluationPlan, RoundPlan
from fedflame.trainer.job import TrainingJob
from fedflame.trainer.limits import memory_needed, scoring_memory_needed
from fedflame.trainer.service import TrainerService
from fedflame.trainer.site import load_site
from fedflame.training.update_norm import update_norm
from fedflame.wire.codec import decode_update, encode_plan
from fedflame.wire.envelope import Envelope

LIMITS = "[limits]\n"
Make = Callable[..., TrainerService]


# What a hub cannot do to a site


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, value) for name in ("batch_size", "max_steps") for value in (0, -1, -(2**62), 2**62)),
        *((name, value) for name in ("round", "active_experts") for value in (0, -1, 2**62)),
        *((name, value) for name in ("client", "seed", "tokens_per_step", "kept_rank") for value in (-1,)),
        *((name, 2**62) for name in ("client", "tokens_per_step", "kept_rank")),
        *(
            (name, value)
            for name in ("learning_rate", "weight_decay", "proximal_mu", "rank_penalty")
            for value in (-1e-9, math.nan, math.inf, -math.inf, 1e7)
        ),
    ],
)
def test_a_number_that_no_plan_can_have_is_refused_before_anything_is_loaded(
    name: str, value: float, make_service: Make, job: TrainingJob, plan: RoundPlan, told: Told
) -> None:
    answer = make_service().answer(request(job, replace(plan, **{name: value})))
    assert answer.header["kind"] == "refused"
    assert f"plan with {name} = {value}; " in answer.header["reason"]
    assert not told.heard("loading") and not told.heard("training")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"r": 40_000}, "the plan asks for rank = 40,000; this site allows at most 256"),
        ({"r": 257}, "the plan asks for rank = 257; this site allows at most 256"),
        ({"r": 10**400}, "the plan asks for rank = 1"),
        ({"r": 2}, "the plan has rank 3; its job says r = 2"),
        ({"r": 0}, "job.r = 0: Input should be greater than or equal to 1"),
        ({"r": True}, "job.r = True: Input should be a valid integer"),
        ({"lora_alpha": math.inf}, "job.lora_alpha = inf: Input should be a finite number"),
        ({"max_length": 10**12}, "this site allows at most 50,000,000"),
        ({"target_modules": ["q_proj"]}, "job.target_modules = ['q_proj']: Input should be a valid string"),
        ({"dtype": "float64"}, "job.dtype = 'float64': Input should be"),
    ],
)
def test_a_job_that_no_site_can_serve_is_refused_before_anything_is_loaded(
    changes: dict[str, Any], reason: str, make_service: Make, job: TrainingJob, plan: RoundPlan, told: Told
) -> None:
    answer = make_service().answer(request(job, plan, job=job.model_dump() | changes))
    assert answer.header["kind"] == "refused" and reason in answer.header["reason"]
    assert not told.heard("loading")


@pytest.mark.parametrize(
    "change",
    [
        lambda adapter: replace(adapter, experts={}),
        lambda adapter: replace(adapter, experts=adapter.experts | {"0.A1": adapter.experts["0.A1"][:2]}),
        lambda adapter: replace(
            adapter, experts={name: bank.double() for name, bank in adapter.experts.items()}
        ),
        lambda adapter: replace(adapter, experts={name: bank[0] for name, bank in adapter.experts.items()}),
        lambda adapter: replace(
            adapter, attention={name: value[..., :1] for name, value in adapter.attention.items()}
        ),
        lambda adapter: adapter.with_rank(0),
    ],
    ids=["no banks", "fewer experts", "double", "matrices", "another rank", "no rank"],
)  # fmt: skip
def test_an_adapter_of_shapes_that_do_not_fit_each_other_is_refused_before_anything_is_loaded(
    change: Callable[[Any], Any], make_service: Make, job: TrainingJob, plan: RoundPlan, told: Told
) -> None:
    answer = make_service().answer(request(job, replace(plan, adapter=change(plan.adapter))))
    assert answer.header["kind"] == "refused" and answer.header["reason"].startswith("plan ")
    assert not told.heard("loading")


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        ("max_rank = 2", "the plan asks for rank = 3; this site allows at most 2"),
        ("max_memory = 1e-6", "GB of memory; this site allows at most 1e-06 GB"),
        ("min_rows_per_update = 7", "the update would be of 6 rows; this site asks for at least 7"),
    ],
)
def test_what_the_sites_file_does_not_allow_is_refused_before_anything_is_loaded(
    limits: str, reason: str, make_service: Make, job: TrainingJob, plan: RoundPlan, told: Told
) -> None:
    answer = make_service(LIMITS + limits).answer(request(job, plan))
    assert answer.header["kind"] == "refused" and reason in answer.header["reason"]
    assert not told.heard("loading") and not told.heard("training")


def _with_template(service: TrainerService, file: str) -> TrainerService:
    path = service._site.folder / "site.toml"
    path.write_text(path.read_text().replace("[data]\n", f'[data]\nchat_template_path = "{file}"\n'))
    return TrainerService(load_site(path), lambda _: None)


@pytest.mark.parametrize(
    ("file", "digest", "reason"),
    [
        ("", "ab" * 16, "the plain form (Instruction, Input, Response), digest none; the hub's abababab)"),
        ("mine.jinja", "", "the chat template of data.chat_template_path, digest "),
    ],
)
def test_a_hub_with_another_chat_template_is_refused(
    file: str, digest: str, reason: str, make_service: Make, job: TrainingJob, plan: RoundPlan, tmp_path: Path
) -> None:
    (tmp_path / "mine.jinja").write_text("{{ messages }}")
    service = _with_template(make_service(), file)
    answer = service.answer(request(job.model_copy(update={"template_digest": digest}), plan))
    assert answer.header["kind"] == "refused" and reason in answer.header["reason"]
    assert answer.header["reason"].startswith("the chat template is another one here (")


def test_the_template_of_the_sites_file_renders_its_rows_if_it_is_the_hubs(
    make_service: Make, job: TrainingJob, plan: RoundPlan, tmp_path: Path
) -> None:
    text = (
        "{% for m in messages %}{{ '[' + m.role + ']' + m.content + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
    )
    (tmp_path / "mine.jinja").write_text(text)
    service = _with_template(make_service(), "mine.jinja")
    digest = Template("given", text, {}).digest
    mine = job.model_copy(update={"template_digest": digest, "max_length": 64})
    assert service.answer(request(mine, plan)).header["kind"] == "update"
    ready = service._work._model.ready
    assert ready is not None
    assert str(ready.tokenizer.decode(ready.rows[1].ids)).startswith("[user]add 1 and 2")


@pytest.mark.parametrize("changes", [{"packed_length": 32}, {"padding_free": True}], ids=str)
def test_rows_that_cannot_share_a_sequence_are_the_reason_before_anything_is_loaded(
    changes: dict[str, Any], make_service: Make, job: TrainingJob, plan: RoundPlan, told: Told,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setitem(NOT_PACKABLE, "olmoe", "of a reason")
    answer = make_service().answer(request(job, replace(plan, **changes)))
    assert answer.header["kind"] == "failed" and not told.heard("loading")
    assert "olmoe cannot be trained with training.packing" in answer.header["reason"]


def test_routers_without_a_load_balancing_loss_are_the_reason_before_anything_is_loaded(
    make_service: Make, job: TrainingJob, plan: RoundPlan, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refused_families, "BALANCED", frozenset())
    answer = make_service().answer(request(job, replace(plan, router_aux_loss_coef=0.1)))
    assert answer.header["kind"] == "failed" and not told.heard("loading")
    assert "olmoe cannot be trained with training.router_aux_loss_coef" in answer.header["reason"]


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


@pytest.mark.parametrize("value", ["true", 1, None, [True]])
def test_a_request_that_says_nonsense_of_its_addition_is_refused(
    value: Any, make_service: Make, job: TrainingJob, plan: RoundPlan
) -> None:
    answer = make_service().answer(request(job, plan, addition=value))
    assert answer.header["kind"] == "refused"
    assert answer.header["reason"] == f"field addition is {value!r}; true or false is needed"


@pytest.mark.parametrize("text", ["\x1b[2J\ud800", "x" * 5000])
def test_foreign_text_reaches_the_log_and_the_answer_in_one_line(
    text: str, make_service: Make, job: TrainingJob, plan: RoundPlan, told: Told
) -> None:
    service, name = make_service(), f"{text}.A".replace("\ud800", "")  # safetensors writes no lone surrogate
    for asked in (
        request(job, plan, site=text),
        request(job, plan, kind=text),
        request(job, plan, run=text),
        request(job, plan, job=job.model_dump() | {"model_name_or_path": text}),
        request(job, plan, job=job.model_dump() | {text: 1}),
        request(job, replace(plan, adapter=replace(plan.adapter, attention={name: torch.ones(3, 4)}))),
    ):
        answer = service.answer(asked)
        reason = answer.header["reason"]
        assert answer.header["kind"] in ("refused", "failed") and reason.isprintable() and len(reason) <= 1000
    assert all(line.isprintable() and len(line) < 1100 for line in told)


# What a site does about its own updates


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
