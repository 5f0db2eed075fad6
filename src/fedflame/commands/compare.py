"""`fedflame compare`: run what is missing of a grid, and lay the methods side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from fedflame.commands.progress import say_line
from fedflame.commands.tables import comparison_table
from fedflame.compare.cell_processes import Progress as CellProgress
from fedflame.compare.cell_processes import failure_kept
from fedflame.compare.grid import Cell, Grid
from fedflame.compare.run import missing_cells, run_grid
from fedflame.compare.tables import setting_name, setting_tables

LOG_TAIL_BYTES = 400


def print_comparison(grid: Grid, workers: int, console: Console) -> bool:
    """Run the grid's unfinished cells, write and print the comparison; whether no cell failed.

    Raises:
        UserError: see `run_grid`.
        KeyboardInterrupt: with how to go on.
    """
    missing = len(missing_cells(grid))
    done = len(grid.cells) - missing
    say_line(console, f"{len(grid.cells)} cells, {done} finished, in {grid.output_dir}")
    try:
        with _progress(console, missing) as progress:
            compared = run_grid(grid, workers, progress)
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt("the same command goes on") from error
    comparison = compared.comparison
    if comparison.results:
        for setting in comparison.settings():
            for table in setting_tables(comparison, setting):
                console.print(comparison_table(table, setting_name(setting)))
        say_line(console, "\n".join(map(str, compared.written)))
    for name, failure in comparison.failures.items():
        say_line(console, f"failed: {name}: {failure} ({grid.output_dir / 'cells' / name / 'log.txt'})")
    return not comparison.failures


def list_cells(grid: Grid, console: Console) -> None:
    """Print every cell of the grid and how far it is."""
    missing = {cell.name for cell in missing_cells(grid)}
    for cell in grid.cells:
        say_line(console, f"{cell.name}: {_state(cell) if cell.name in missing else 'finished'}")
    console.print(f"{len(grid.cells)} cells, {len(grid.cells) - len(missing)} finished")


def _state(cell: Cell) -> str:
    if failure := failure_kept(cell):
        return f"failed, to run again: {failure}"
    return "begun, to go on" if cell.run.exists() else "to run"


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
        say_line(self._console, line)


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
