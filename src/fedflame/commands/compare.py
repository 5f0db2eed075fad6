"""`fedflame compare`: run what is missing of a grid, and lay the methods side by side."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from fedflame.commands.cell_processes import Progress as CellProgress
from fedflame.commands.cell_processes import failure_kept, run_cells
from fedflame.commands.tables import comparison_table
from fedflame.compare.files import read_comparison, write_comparison
from fedflame.compare.grid import Cell, Grid
from fedflame.compare.results import is_finished
from fedflame.compare.tables import setting_name, setting_tables
from fedflame.data.sources import refuse_missing_file
from fedflame.errors import UserError

LOG_TAIL_BYTES = 400


def run_comparison(grid: Grid, workers: int, console: Console) -> bool:
    """Run the grid's unfinished cells, write and print the comparison; whether no cell failed.

    Raises:
        UserError: the folder holds something else, another comparison is at work there, or what a
            cell would train on is a file that is missing.
        KeyboardInterrupt: with how to go on.
    """
    _check_folder(grid.output_dir)
    _check_data(grid)
    with _alone(grid.output_dir):
        return _run_missing(grid, workers, console)


def _missing(grid: Grid) -> list[Cell]:
    return [cell for cell in grid.cells if not is_finished(cell)]


def _run_missing(grid: Grid, workers: int, console: Console) -> bool:
    missing = _missing(grid)
    done = len(grid.cells) - len(missing)
    counts = f"{len(grid.cells)} cells, {done} finished, in {grid.output_dir / 'cells'}"
    console.print(counts, soft_wrap=True, markup=False, highlight=False)
    try:
        with _progress(console, len(missing)) as progress:
            failures = run_cells(missing, workers, progress)
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt("the same command goes on") from error
    comparison = read_comparison(grid, failures)
    if comparison.results:
        written = write_comparison(comparison)
        for setting in comparison.settings():
            for table in setting_tables(comparison, setting):
                console.print(comparison_table(table, setting_name(setting)))
        console.print("\n".join(map(str, written)), soft_wrap=True, markup=False, highlight=False)
    for name, failure in failures.items():
        log = grid.output_dir / "cells" / name / "log.txt"
        console.print(f"failed: {name}: {failure} ({log})", soft_wrap=True, markup=False, highlight=False)
    return not failures


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Two at work on the same cells would spoil them; the lock ends with the process."""
    (folder / "cells").mkdir(parents=True, exist_ok=True)
    with (folder / "cells" / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"{folder}: another `fedflame compare` is at work there") from error
        yield


def list_cells(grid: Grid, console: Console) -> None:
    """Print every cell of the grid and how far it is."""
    for cell in grid.cells:
        console.print(f"{cell.name}: {_state(cell)}", soft_wrap=True, markup=False, highlight=False)
    done = sum(map(is_finished, grid.cells))
    console.print(f"{len(grid.cells)} cells, {done} finished")


def _state(cell: Cell) -> str:
    if is_finished(cell):
        return "finished"
    if failure := failure_kept(cell):
        return f"failed, to run again: {failure}"
    return "begun, to go on" if cell.run.exists() else "to run"


def _check_folder(folder: Path) -> None:
    if folder.exists() and not (
        folder.is_dir() and ((folder / "cells").is_dir() or not any(folder.iterdir()))
    ):
        raise UserError(f"{folder}: exists and is no comparison (it has no cells/); it is left as it is")


def _check_data(grid: Grid) -> None:
    """One line instead of one per cell; what is finished needs no data."""
    for name in dict.fromkeys(cell.config.data.dataset_name for cell in _missing(grid)):
        refuse_missing_file(name)


@contextmanager
def _progress(console: Console, cells: int) -> Iterator[CellProgress]:
    """Live lines on a terminal, a line per ended cell otherwise."""
    if not console.is_terminal:
        yield CellLines(console, cells)
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[last]}"),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        yield LiveCells(console, cells, progress)


class CellLines:
    """One line per ended cell."""

    def __init__(self, console: Console, cells: int) -> None:
        self._console, self._cells, self._ended = console, cells, 0

    def working(self, cells: Sequence[Cell]) -> None:
        pass

    def ended(self, cell: Cell, failure: str | None) -> None:
        self._ended += 1
        outcome = f"failed: {failure}" if failure else "finished"
        line = f"{self._ended} of {self._cells}: {cell.name} {outcome}"
        self._console.print(line, soft_wrap=True, markup=False, highlight=False)


class LiveCells(CellLines):
    """Below those, a line per running cell with the last that its run has said."""

    def __init__(self, console: Console, cells: int, progress: Progress) -> None:
        super().__init__(console, cells)
        self._progress = progress
        self._tasks: dict[str, TaskID] = {}

    def working(self, cells: Sequence[Cell]) -> None:
        for cell in cells:
            if cell.name not in self._tasks:
                self._tasks[cell.name] = self._progress.add_task(cell.name, last="", total=None)
            self._progress.update(self._tasks[cell.name], last=_last_line(cell.folder / "log.txt"))

    def ended(self, cell: Cell, failure: str | None) -> None:
        super().ended(cell, failure)
        self._progress.remove_task(self._tasks.pop(cell.name))


def _last_line(log: Path) -> str:
    if not log.exists():
        return ""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - LOG_TAIL_BYTES))
        lines = file.read().decode(errors="replace").splitlines()
    return lines[-1] if lines else ""
