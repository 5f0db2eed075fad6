"""What `fedflame compare` finds before the first cell runs, and that it then writes nothing."""

from __future__ import annotations

import fcntl
from pathlib import Path

import pytest
from tests.commands.compared import METHODS, write_grid
from tests.tiny_runs import invoke

from fedflame.commands.compare import LOG_TAIL_BYTES, _last_line

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("compare_cache")]


def test_a_dry_run_lists_the_cells_and_writes_nothing(tiny_folder: Path, tmp_path: Path) -> None:
    grid = write_grid(tmp_path, tiny_folder)
    result = invoke("compare", grid, "--output-dir", tmp_path / "out", "--dry-run")
    lines = result.stdout.splitlines()
    assert [line.endswith(": to run") for line in lines] == [True] * 4 + [False]
    assert lines[-1] == "4 cells, 0 finished"
    assert not (tmp_path / "out").exists()


def test_a_mistake_is_found_before_the_first_cell_runs(tiny_folder: Path, tmp_path: Path) -> None:
    grid = write_grid(tmp_path, tiny_folder, METHODS + "strategy.temprature = 1\n")
    result = invoke("compare", grid, "--output-dir", tmp_path / "out")
    assert result.exit_code == 2
    assert result.stderr.startswith(
        "fedflame: config: unknown key 'strategy.temprature'; the nearest valid key"
    )
    assert not (tmp_path / "out").exists()


def test_missing_data_is_one_line_before_the_first_cell_runs(tiny_folder: Path, tmp_path: Path) -> None:
    grid, absent = write_grid(tmp_path, tiny_folder), tmp_path / "rows.jsonl"
    result = invoke("compare", grid, "--output-dir", tmp_path / "out", "--data", absent)
    assert result.exit_code == 2
    assert result.stderr == f"fedflame: data.dataset_name = '{absent}': no such file\n"
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_no_comparison_is_left_alone(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "report.html").write_text("years of work")
    result = invoke("compare", write_grid(tmp_path, tiny_folder), "--output-dir", tmp_path / "thesis")
    assert result.exit_code == 2
    assert (
        "exists and is no comparison (it has no cells.jsonl and no cells/); it is left as it is"
        in result.stderr
    )
    assert [path.name for path in (tmp_path / "thesis").iterdir()] == ["report.html"]


def test_a_second_comparison_in_the_same_folder_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out" / "cells").mkdir(parents=True)
    with (tmp_path / "out" / "cells" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        result = invoke("compare", write_grid(tmp_path, tiny_folder), "--output-dir", tmp_path / "out")
    assert result.exit_code == 2
    assert result.stderr == (
        f"fedflame: {tmp_path / 'out'}: another `fedflame compare` is at work there (a process "
        "that has just begun)\n"
    )


def test_the_last_line_of_a_log(tmp_path: Path) -> None:
    assert _last_line(tmp_path / "log.txt") == ""
    (tmp_path / "log.txt").write_text("x" * LOG_TAIL_BYTES + "\nround 1: é\n")
    assert _last_line(tmp_path / "log.txt") == "round 1: é"
