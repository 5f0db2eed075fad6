"""Cells of a comparison whose process dies, or that were done and not recorded."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import pytest
from tests.commands.compared import FEDAVG, kept, write_grid
from tests.tiny_runs import invoke

from fedflame.compare import cell_processes
from fedflame.compare.cell_processes import run_cells
from fedflame.compare.grid import Cell, read_grid
from fedflame.compare.results import CellResult, has_left_result

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("compare_cache")]


class Told:
    """What the cells came to."""

    def __init__(self) -> None:
        self.worked: set[str] = set()
        self.outcomes: list[tuple[str, str | None]] = []

    def working(self, cells: Sequence[Cell]) -> None:
        self.worked |= {cell.name for cell in cells}

    def ended(self, cell: Cell, failure: str | None) -> None:
        self.outcomes.append((cell.method, failure))


def test_a_process_that_dies_loses_its_cell_only(tiny_folder: Path, tmp_path: Path) -> None:
    grid = read_grid(write_grid(tmp_path, tiny_folder, seeds="[0]"), [], str(tmp_path / "out"))

    class Kill(Told):
        def working(self, cells: Sequence[Cell]) -> None:
            if cells[0].method == "flame":
                for process in multiprocessing.active_children():
                    process.kill()

    told = Kill()
    failures = run_cells(grid, 1, told)
    assert told.outcomes == [("flame", "its process ended with exit code -9"), ("fedavg", None)]
    assert failures == {grid.cells[0].name: "its process ended with exit code -9"}


def test_a_cell_that_was_done_and_not_recorded_is_recorded_and_not_run_again(
    tiny_folder: Path, tmp_path: Path
) -> None:
    grid = read_grid(write_grid(tmp_path, tiny_folder, FEDAVG, "[0]"), [], str(tmp_path / "out"))

    def dies(path: Path, results: Mapping[str, CellResult], of: Iterable[Cell]) -> Mapping[str, CellResult]:
        if any(map(has_left_result, of)):
            raise KeyboardInterrupt
        return results

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(cell_processes, "take_over", dies)
        run_cells(grid, 1, Told())
    assert has_left_result(grid.cells[0]) and not kept(grid.output_dir)
    listed = invoke("compare", tmp_path / "grid.toml", "--output-dir", tmp_path / "out", "--dry-run")
    assert listed.stdout.splitlines()[-1] == "1 cells, 1 finished"
    told = Told()
    assert run_cells(grid, 1, told) == {} and not told.worked
    assert list(kept(grid.output_dir)) == [grid.cells[0].name] and not has_left_result(grid.cells[0])
