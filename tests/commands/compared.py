"""Grids of two methods and two seeds on the tiny model, and what is kept of their cells."""

from __future__ import annotations

from pathlib import Path

from tests.tiny_runs import SETTINGS

from fedflame.compare.results import RESULTS, CellResult, read_results

FEDAVG = '[methods.fedavg]\nstrategy.name = "fedavg"\n'
METHODS = f"[methods.flame]\nstrategy.temperature = 2\n{FEDAVG}"


def write_grid(folder: Path, model: Path, methods: str = METHODS, seeds: str = "[0, 1]") -> Path:
    base = [setting.split("=") for setting in (*SETTINGS, f"model.model_name_or_path={model}")]
    lines = [f'{key} = "{value}"' for key, value in base]
    path = folder / "grid.toml"
    path.write_text(
        "\n".join(['baseline = "fedavg"', "[base]", *lines, methods, "[grid]", f"seed = {seeds}"])
    )
    return path


def kept(folder: Path) -> dict[str, CellResult]:
    """The results file."""
    return read_results(folder / RESULTS)
