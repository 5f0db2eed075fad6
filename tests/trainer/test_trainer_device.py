"""The device of a trainer: that of the site's file, and what is said where it is too small or not there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.engines_here import write_site
from tests.fake_cards import fake_cards, load_on_cpu
from tests.trainer_asked import MODEL, Told, request

from fedflame.errors import UserError
from fedflame.messages import RoundPlan
from fedflame.trainer.job import TrainingJob
from fedflame.trainer.service import TrainerService
from fedflame.trainer.site import load_site


def test_the_base_lies_on_the_device_of_the_sites_file(
    make_service: Callable[..., TrainerService], job: TrainingJob, plan: RoundPlan, told: Told,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    asked = load_on_cpu(monkeypatch, "fedflame.trainer.model")
    fake_cards(monkeypatch, tmp_path, (80_000_000_000, 80_000_000_000))
    path = make_service()._site.folder / "site.toml"
    path.write_text(path.read_text().replace("[trainer]\n", '[trainer]\ndevice = "cuda:1"\n'))
    service = TrainerService(load_site(path), told.append)
    assert service.answer(request(job, plan)).header["kind"] == "update"
    assert asked == ["cuda:1"]
    assert told.heard("loading the-model in float32 onto cuda:1, NVIDIA H200, 80.0 GB, CUDA 13.0, ") == 1


def test_a_full_memory_is_the_reason_and_the_trainer_goes_on(
    make_service: Callable[..., TrainerService], job: TrainingJob, plan: RoundPlan,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def too_large(*arguments: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nmore lines")

    service = make_service()
    with monkeypatch.context() as patch:
        patch.setattr("fedflame.trainer.work.fine_tune", too_large)
        answer = service.answer(request(job, plan))
    assert answer.header["kind"] == "failed"
    assert answer.header["reason"] == (
        "cpu ran out of memory while training at k = 2 with 2 rows per batch and gradient_checkpointing = "
        "'none'; take gradient_checkpointing = 'experts' or 'layers', fewer tokens per batch, a smaller "
        "adapter.r, or a device with more memory"
    )
    assert service.answer(request(job, plan)).header["kind"] == "update"


@pytest.mark.parametrize(
    ("memory", "free", "asked"),
    [((10_000,), (10_000,), []), ((150_000, 150_000), (150_000, 150_000), ["balanced"])],
)
def test_a_card_that_is_too_small_is_known_before_the_base_is_loaded(
    memory: tuple[int, ...], free: tuple[int, ...], asked: list[str],
    make_service: Callable[..., TrainerService], job: TrainingJob, plan: RoundPlan,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    loaded = load_on_cpu(monkeypatch, "fedflame.trainer.model")
    fake_cards(monkeypatch, tmp_path, memory, free)
    answer = make_service().answer(request(job, plan))
    assert loaded == asked
    if not asked:
        assert answer.header["kind"] == "failed"
        assert answer.header["reason"].startswith(
            "training at k = 2 with 2 rows per batch and gradient_checkpointing = 'none' takes at least 0.0 "
            "GB for the base in float32 and the adapter of rank 3 with its moments, whatever k and tokens "
            "are; cuda:0 (NVIDIA H200) has 0.0 GB; take "
        )


def test_a_hub_cannot_choose_the_device(
    make_service: Callable[..., TrainerService], job: TrainingJob, plan: RoundPlan
) -> None:
    asked = request(job, plan, job=job.model_dump() | {"device": "cuda:1"})
    answer = make_service().answer(asked)
    assert (
        answer.header["kind"] == "refused"
        and "job.device = 'cuda:1': Extra inputs" in answer.header["reason"]
    )


def test_a_device_that_is_not_there_is_refused_before_the_rows_are_read(tmp_path: Path) -> None:
    site = load_site(write_site(tmp_path, "north", tmp_path / "none.jsonl", 2, {MODEL: "none"}))
    trainer = site.trainer.model_copy(update={"device": "cuda"})
    with pytest.raises(UserError, match=r"^trainer\.device = 'cuda': torch "):
        TrainerService(site.model_copy(update={"trainer": trainer}), lambda _: None)
