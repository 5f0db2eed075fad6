"""Plans and jobs that no site can serve: refused, or the reason is said, before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.trainer_asked import Make, Told, request

from fedflame.cost import refused_families
from fedflame.cost.refused_families import NOT_PACKABLE
from fedflame.data.templates import Template
from fedflame.messages import RoundPlan
from fedflame.trainer.job import TrainingJob
from fedflame.trainer.service import TrainerService
from fedflame.trainer.site import load_site


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
