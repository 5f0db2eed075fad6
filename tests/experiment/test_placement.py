"""What an experiment needs of a card, by what it does there and with how many workers."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.fake_cards import fake_cards
from tests.tiny_runs import tiny_config

from fedflame.base.device import ALL_CARDS
from fedflame.base.dtype import DtypeChoice
from fedflame.config.run_config import RunConfig
from fedflame.cost.memory import least_evaluation_memory, least_training_memory
from fedflame.cost.model_shape import ModelShape, read_model_shape
from fedflame.errors import UserError
from fedflame.experiment.placement import place

SETTINGS = ("model.dtype=float32", "clients.active_experts=2,1", "training.tokens_per_step=64,96")


@pytest.fixture
def config(tiny_folder: Path, tmp_path: Path) -> RunConfig:
    return tiny_config(tiny_folder, tmp_path / "run", *SETTINGS)


@pytest.fixture
def shape(tiny_folder: Path) -> ModelShape:
    return read_model_shape(tiny_folder)


def needs(config: RunConfig, shape: ModelShape) -> tuple[int, int]:
    """For training and for an evaluation."""
    setting = (shape, config.adapter.r, config.adapter.target_modules, "float32")
    return least_training_memory(*setting), least_evaluation_memory(*setting)  # type: ignore[arg-type]


def test_training_needs_more_than_an_evaluation(
    config: RunConfig, shape: ModelShape, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training, evaluation = needs(config, shape)
    fake_cards(monkeypatch, tmp_path, (training,))
    assert place(config, shape)[0].name == "cuda:0"
    fake_cards(monkeypatch, tmp_path, (training - 1,))
    with pytest.raises(UserError, match=r"^training at k = 2 with 96 tokens per batch and "):
        place(config, shape)
    fake_cards(monkeypatch, tmp_path, (evaluation,))
    assert place(config, shape, workers=0)[0].name == "cuda:0"
    fake_cards(monkeypatch, tmp_path, (evaluation - 1,))
    with pytest.raises(UserError, match=r"^evaluating takes at least "):
        place(config, shape, workers=0)


@pytest.mark.parametrize(
    ("cards", "workers", "fits"), [(1, 2, 2), (2, 2, 1), (2, 3, 2), (2, 4, 2), (2, 5, 3)]
)
def test_every_worker_on_a_card_needs_a_base(
    cards: int,
    workers: int,
    fits: int,
    config: RunConfig,
    shape: ModelShape,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    training, _ = needs(config, shape)
    fake_cards(monkeypatch, tmp_path, (fits * training,) * cards)
    assert place(config, shape, workers=workers)[0].name == "cuda:0"
    fake_cards(monkeypatch, tmp_path, (fits * training - 1,) * cards, free=(training,) * cards)
    with pytest.raises(UserError, match=f"in {fits} workers on a card" if fits > 1 else "takes at least"):
        place(config, shape, workers=workers)


def test_all_cards_together_serve_one_worker(
    config: RunConfig, shape: ModelShape, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training, _ = needs(config, shape)
    fake_cards(monkeypatch, tmp_path, (training - 1, training))
    device, _ = place(config, shape)
    assert device.name == ALL_CARDS and "slowly: one card works at a time" in device.reason
    with pytest.raises(UserError) as refused:
        place(config, shape, workers=2)
    assert str(refused.value) == f"2 workers: {device.reason}, and all cards together serve one worker"


def test_the_dtype_of_before_is_kept(
    config: RunConfig, shape: ModelShape, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_cards(monkeypatch, tmp_path, (10**9,))
    before = DtypeChoice("float16", "as before")
    assert place(config, shape, before)[1] is before
    assert place(config, shape)[1].name == "float32"
