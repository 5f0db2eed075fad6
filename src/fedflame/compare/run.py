"""Run the missing cells of a grid, as the only process in its folder, and compare the methods."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fedflame.compare.cell_processes import Progress, run_cells
from fedflame.compare.comparison import Comparison
from fedflame.compare.files import read_comparison, write_comparison
from fedflame.compare.grid import Cell, Grid
from fedflame.compare.results import RESULTS, has_left_result, read_results
from fedflame.data.sources import refuse_missing_file
from fedflame.errors import UserError
from fedflame.folder_lock import sole_user


@dataclass(frozen=True)
class Compared:
    """The result of running a grid."""

    comparison: Comparison
    written: list[Path]
    """The files of the comparison; empty if no cell is finished."""


def missing_cells(grid: Grid) -> list[Cell]:
    """The cells without results, in the order of the grid. Raises UserError as `read_results` does."""
    kept = read_results(grid.output_dir / RESULTS)
    return [cell for cell in grid.cells if cell.name not in kept and not has_left_result(cell)]


def run_grid(grid: Grid, workers: int, progress: Progress) -> Compared:
    """Run the grid's unfinished cells, `workers` at a time, and write the comparison.

    Raises:
        UserError: the folder holds something else, another comparison is at work there, its results
            file is damaged, or what a cell would train on is a file that is missing.
    """
    _check_folder(grid.output_dir)
    _check_data(grid)
    refusal = f"{grid.output_dir}: another `fedflame compare` is at work there"
    (grid.output_dir / "cells").mkdir(parents=True, exist_ok=True)
    with sole_user(grid.output_dir / "cells" / ".lock", refusal):
        failures = run_cells(grid, workers, progress)
        comparison = read_comparison(grid, failures)
        return Compared(comparison, write_comparison(comparison) if comparison.results else [])


def _check_folder(folder: Path) -> None:
    known = (folder / RESULTS).exists() or (folder / "cells").is_dir()
    if folder.exists() and not known and not (folder.is_dir() and not any(folder.iterdir())):
        what = f"exists and is no comparison (it has no {RESULTS} and no cells/)"
        raise UserError(f"{folder}: {what}; it is left as it is")


def _check_data(grid: Grid) -> None:
    """Check the data files of unfinished cells before the run: a missing file then gives only one error."""
    for name in dict.fromkeys(cell.config.data.dataset_name for cell in missing_cells(grid)):
        refuse_missing_file(name)
