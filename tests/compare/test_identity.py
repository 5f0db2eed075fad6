"""The name of a cell: what may change in fedflame without losing results, and what must not."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedflame.compare import grid as grid_module
from fedflame.compare.grid import read_grid
from fedflame.compare.results import read_results
from fedflame.config import load as load_module
from fedflame.config.run_config import SCHEMA_VERSION, WITHOUT, RunConfig
from fedflame.config.sections import TrainingConfig
from fedflame.config.settings import flat, read_toml

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
GRID = """
[methods.flame]
[methods.plain]
strategy.name = "fedavg"
[grid]
seed = [0, 1]
training.learning_rate = [1e-3, 2e-3]
"""


class LaterTraining(TrainingConfig):
    warmup_steps: int = 0


class LaterConfig(RunConfig):
    """A version with one more option, which is off by default."""

    training: LaterTraining = LaterTraining()


def names(folder: Path, *overrides: str) -> set[str]:
    (folder / "grid.toml").write_text(GRID)
    return {cell.name for cell in read_grid(folder / "grid.toml", overrides, None).cells}


def test_an_option_that_is_added_and_off_changes_no_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = names(tmp_path)
    for module in (grid_module, load_module):
        monkeypatch.setattr(module, "RunConfig", LaterConfig)
    assert names(tmp_path) == before
    assert names(tmp_path, "training.warmup_steps=3").isdisjoint(before)


def test_another_schema_version_shares_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = names(tmp_path)
    monkeypatch.setattr(grid_module, "SCHEMA_VERSION", SCHEMA_VERSION + 1)
    assert names(tmp_path).isdisjoint(before)


def test_what_is_said_as_the_default_is_the_same_cell(tmp_path: Path) -> None:
    assert names(tmp_path, "data.alpha=5.0", "clients.active_experts=8,4,2,1") == names(tmp_path)


def test_where_a_run_reports_to_is_no_other_cell(tmp_path: Path) -> None:
    assert names(tmp_path, "report_to=wandb", "run_name=first") == names(tmp_path)


def test_a_newer_option_that_is_set_to_what_was_run_without_it_is_the_same_cell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    off = names(tmp_path, *(f"{key}={value}" for key, value in WITHOUT.items()))
    on = names(tmp_path)
    assert off.isdisjoint(on)
    before = {key: value for key, value in flat(RunConfig().model_dump()).items() if key not in WITHOUT}
    monkeypatch.setattr(
        grid_module,
        "_flat_settings",
        lambda config: {
            key: value
            for key, value in flat(config.model_dump(exclude={"output_dir"})).items()
            if key in before
        },
    )
    assert names(tmp_path) == off, "a version without these keys gave the cells these names"


GRIDS = [path for path in sorted(BENCHMARKS.glob("*/*.toml")) if "methods" in read_toml(path)]


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_the_committed_results_of_a_benchmark_are_cells_of_its_grid(path: Path) -> None:
    files = [path.parent / "results" / part / "cells.jsonl" for part in ("", path.stem)]
    kept = set[str]().union(*(read_results(file) for file in files))
    assert kept <= {cell.name for cell in read_grid(path, [], None).cells}


def test_a_default_changes_only_with_the_schema_version() -> None:
    defaults = flat(RunConfig().model_dump(mode="json", exclude={"output_dir"}))
    changed = {key: defaults.get(key) for key, value in DEFAULTS.items() if defaults.get(key) != value}
    assert (SCHEMA_VERSION, changed) == (VERSION, {}), (
        "results are kept by what differs from the defaults: raise SCHEMA_VERSION where one of them changes, "
        "and write the new defaults here"
    )


VERSION = 1
DEFAULTS = {
    "seed": 0,
    "model.model_name_or_path": "olmoe-tiny",
    "model.adapter_name_or_path": "",
    "model.device": "auto",
    "model.dtype": "auto",
    "adapter.r": 8,
    "adapter.lora_alpha": 16.0,
    "adapter.target_modules": ["auto"],  # the four of before, for models that have these alone
    "data.dataset_name": "skills",
    "data.split": "train",
    "data.dataset_config_name": "",
    "data.instruction_field": "",
    "data.context_field": "",
    "data.response_field": "",
    "data.category_field": "",
    "data.max_rows": 0,
    "data.max_length": 0,
    "data.partition": "dirichlet",
    "data.alpha": 5.0,
    "clients.num_clients": 4,
    "clients.active_experts": [8, 4, 2, 1],
    "clients.ranks": [],
    "training.learning_rate": 0.005,
    "training.lr_scheduler_type": "cosine",
    "training.weight_decay": 0.0,
    "training.per_device_train_batch_size": 8,
    "training.tokens_per_step": [],
    "training.max_steps": 80,
    "training.budget": "steps",
    "training.proximal_mu": 0.0,
    "training.gradient_checkpointing": "none",
    "strategy.name": "flame",
    "strategy.temperature": 1.0,
    "strategy.rescaler": "learned",
    "strategy.count_normalization": "slot",
    "strategy.tier_affinity": 0.7,
    "strategy.k_rotation": "auto",
    "strategy.learning_rate_exponent": 0.0,
    "strategy.active_experts": "min",
    "strategy.rank": "full",
    "strategy.counted_rows": "trained",
    "strategy.rank_decay": 0.0,
    "server.num_server_rounds": 10,
    "server.fraction_train": 1.0,
    "server.min_clients": 1,
    "communication.update_dtype": "float32",
    "evaluation.split": "test",
    "evaluation.rows_per_category": 20,
    "evaluation.evaluate_every": 1,
    "evaluation.generate_every": 3,
    "evaluation.max_new_tokens": 24,
}
"""Of that version; an option that came later and is off need not be here."""
