"""A trainer of a tiny model, and a plan for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.engines_here import write_site
from tests.tiny_models import TOP_K
from tests.trainer_asked import MODEL, ROWS, Told

from fedflame.base.adapted import load_adapted_model
from fedflame.base.files import model_digest
from fedflame.messages import RoundPlan
from fedflame.trainer.job import TrainingJob
from fedflame.trainer.service import TrainerService
from fedflame.trainer.site import load_site


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("silo") / "rows.jsonl"
    lines = [f'{{"instruction": "add {n} and 2", "response": "{n + 2}"}}\n' for n in range(ROWS)]
    path.write_text("".join(lines))
    return path


@pytest.fixture(scope="module")
def job(tiny_folder: Path) -> TrainingJob:
    return TrainingJob(
        model_name_or_path=MODEL,
        model_digest=model_digest(str(tiny_folder)),
        dtype="float32",
        r=3,
        lora_alpha=6.0,
        use_rslora=False,
        target_modules="q_proj",
        max_length=32,
        template_digest="",
        assistant_only_loss=True,
        completion_only_loss="auto",
        train_on_eos=True,
        num_server_rounds=5,
    )


@pytest.fixture(scope="module")
def plan(tiny_folder: Path, job: TrainingJob) -> RoundPlan:
    adapted, _ = load_adapted_model(str(tiny_folder), "float32", job.adapter)
    return RoundPlan(
        round=2, client=1, seed=5, active_experts=2, rescaler="learned",
        rescaler_values=torch.ones(len(adapted.layers)),
        adapter=adapted.initial_adapter(0), learning_rate=0.01, weight_decay=0.0, batch_size=2, max_steps=3,
    )  # fmt: skip


@pytest.fixture
def told() -> Told:
    return Told()


@pytest.fixture
def make_service(data: Path, tiny_folder: Path, tmp_path: Path, told: Told) -> Callable[..., TrainerService]:
    def make(more: str = "", k: int = TOP_K) -> TrainerService:
        path = write_site(tmp_path, "north", data, k, {MODEL: str(tiny_folder)})
        path.write_text(path.read_text() + more)
        return TrainerService(load_site(path), told.append)

    return make
