"""Run the missing cells of a grid, as the only process in its folder, and compare the methods."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fedflame.compare.cell_processes import Progress, run_cells
from fedflame.compare.comparison import Comparison
from fedflame.compare.files import read_comparison, write_comparison
from fedflame.compare.grid import Cell, Grid
from fedflame.compare.results import is_finished
from fedflame.data.sources import refuse_missing_file
from fedflame.errors import UserError


@dataclass(frozen=True)
class Compared:
    """The result of running a grid."""

    comparison: Comparison
    written: list[Path]
    """The files of the comparison; empty if no cell is finished."""


def missing_cells(grid: Grid) -> list[Cell]:
    """Return the cells without results, in the order of the grid."""
    return [cell for cell in grid.cells if not is_finished(cell)]


def run_grid(grid: Grid, workers: int, progress: Progress) -> Compared:
    """Run the grid's unfinished cells, `workers` at a time, and write the comparison.

    Raises:
        UserError: the folder is not one of a comparison, another comparison runs there, or a data file is
            missing.
    """
    _check_folder(grid.output_dir)
    _check_data(grid)
    with _alone(grid.output_dir):
        failures = run_cells(missing_cells(grid), workers, progress)
        comparison = read_comparison(grid, failures)
        return Compared(comparison, write_comparison(comparison) if comparison.results else [])


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the folder's lock within the block: two processes would spoil each other's cells."""
    (folder / "cells").mkdir(parents=True, exist_ok=True)
    with (folder / "cells" / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"{folder}: another `fedflame compare` is at work there") from error
        yield


def _check_folder(folder: Path) -> None:
    if folder.exists() and not (
        folder.is_dir() and ((folder / "cells").is_dir() or not any(folder.iterdir()))
    ):
        raise UserError(f"{folder}: exists and is no comparison (it has no cells/); it is left as it is")


def _check_data(grid: Grid) -> None:
    """Check the data files of unfinished cells before the run: a missing file then gives only one error."""
    for name in dict.fromkeys(cell.config.data.dataset_name for cell in missing_cells(grid)):
        refuse_missing_file(name)
