"""`fedflame compare` on a grid of two methods and two seeds: whole, interrupted, failing, and enlarged."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from tests.cli_process import CliProcess, wait_until_gone
from tests.commands.compared import FEDAVG, METHODS, kept, write_grid
from tests.tiny_runs import adapter_bytes, invoke, start_cli

from fedflame.clients.fork_server import SIGNALS
from fedflame.compare.results import RESULTS, CellResult
from loopback import descendants

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("compare_cache")]


@pytest.fixture(scope="module")
def finished(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison that nothing disturbed, two cells at a time."""
    folder = tmp_path_factory.mktemp("compare")
    grid = write_grid(folder, tiny_folder)
    result = invoke("compare", grid, "--output-dir", folder / "out", "--workers", 2)
    assert result.exit_code == 0, result.output
    return folder / "out"


def cells(folder: Path) -> dict[str, Path]:
    return {path.name: path for path in sorted((folder / "cells").iterdir()) if path.is_dir()}


def outcomes(folder: Path) -> dict[str, CellResult]:
    """The results file without what a clock wrote."""
    return {
        name: replace(
            result, environment={}, clients=[replace(client, seconds=0.0) for client in result.clients]
        )
        for name, result in kept(folder).items()
    }


def losses_beyond(folder: Path, method: str) -> list[float]:
    """The method's row of the first table of differences in table.md: the means, at each k."""
    _, _, differences = (folder / "table.md").read_text().partition(": difference to ")
    row = next(line for line in differences.splitlines() if line.startswith(f"| {method} "))
    return [float(entry.split()[0]) for entry in row.split("|")[2:-1]]


def test_a_comparison_leaves_cells_table_results_and_page(finished: Path) -> None:
    files = {"cells", "cells.jsonl", "report.html", "results.json", "table.md"}
    assert {path.name for path in finished.iterdir()} == files
    for cell in cells(finished).values():
        assert {path.name for path in cell.iterdir()} == {"log.txt", "run"}
    assert list(kept(finished)) == list(cells(finished))
    names = [name.rpartition("-")[0] for name in kept(finished)]
    assert names == ["fedavg-seed-0", "fedavg-seed-1", "flame-seed-0", "flame-seed-1"]
    table = (finished / "table.md").read_text()
    assert "over 2 seeds" in table and "difference to fedavg at the same seed" in table
    assert "<html" in (finished / "report.html").read_text()


def test_the_table_holds_what_the_runs_measured(finished: Path) -> None:
    records = json.loads((finished / "results.json").read_text())
    assert [(cell["method"], cell["seed"]) for cell in records["cells"]] == [
        ("flame", 0), ("fedavg", 0), ("flame", 1), ("fedavg", 1),
    ]  # fmt: skip
    for record in records["cells"]:
        run = finished / "cells" / record["cell"] / "run"
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        last = {e["active_experts"]: e for e in lines if e["event"] == "evaluation" and e["category"] is None}
        assert {int(k): values["loss"] for k, values in record["final"].items()} == {
            k: event["loss"] for k, event in last.items()
        }
        clients = [event for event in lines if event["event"] == "client"]
        assert record["rounds"][-1]["training_flops"] == pytest.approx(
            sum(event["training_flops"] for event in clients)
        )
        assert record["rounds"][-1]["bytes"] == sum(e["bytes_up"] + e["bytes_down"] for e in clients)
        assert record["rounds"][-1]["simulated_seconds"] > 0


def test_interrupted_and_killed_and_resumed_it_ends_the_same(
    finished: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    grid, out = write_grid(tmp_path, tiny_folder), tmp_path / "out"
    interrupt_here(grid, out)
    process = start(grid, out)
    wait_for_cell(process, out, 1)
    children = descendants(process.pid)
    assert children
    process.kill()
    assert process.wait(60) == -signal.SIGKILL
    wait_until_gone(children)
    before = kept(out)
    assert 0 < len(before) < 4
    result = invoke("compare", grid, "--output-dir", out)
    assert result.exit_code == 0, result.output
    assert cells(out).keys() == cells(finished).keys()
    assert outcomes(out) == outcomes(finished)
    assert before.items() <= kept(out).items(), "a finished cell was run again"
    for name, cell in cells(out).items():
        assert adapter_bytes(cell / "run") == adapter_bytes(cells(finished)[name] / "run")
    tables = [(folder / "table.md").read_text() for folder in (out, finished)]
    assert tables[0] == tables[1]


def test_a_failed_cell_is_reported_and_the_others_finish(
    finished: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    broken = '[methods.broken]\nstrategy.name = "fedavg"\nstrategy.active_experts = "5"\n'
    two = '[methods.two]\nstrategy.name = "fedavg"\nstrategy.active_experts = "2"\n'
    grid = write_grid(tmp_path, tiny_folder, broken + METHODS + two, "[0]")
    result = invoke("compare", grid, "--output-dir", out)
    assert result.exit_code == 1, result.output
    reason = "strategy.active_experts 5: must be 'min', 'full' or between 1 and 4"
    assert "4 cells, 2 finished" in result.stdout
    assert result.stdout.count(reason) == 2, "when it happens and at the end"
    failed = next(cell for name, cell in cells(out).items() if name.startswith("broken"))
    assert (failed / "error.txt").read_text().startswith(reason)
    assert "Traceback" in (failed / "log.txt").read_text()
    records = json.loads((out / "results.json").read_text())
    assert {cell["method"] for cell in records["cells"]} == {"flame", "fedavg", "two"}
    assert list(records["failed"]) == [failed.name]
    listed = invoke("compare", grid, "--output-dir", out, "--dry-run")
    assert f"{failed.name}: failed, to run again: {reason}" in listed.stdout


def test_another_seed_runs_only_what_is_missing(finished: Path, tiny_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    before = kept(out)
    grid = write_grid(tmp_path, tiny_folder, seeds="[0, 1, 2]")
    result = invoke("compare", grid, "--output-dir", out, "--workers", 2)
    assert result.exit_code == 0, result.output
    assert "6 cells, 4 finished" in result.stdout and "2 of 2: " in result.stdout
    assert len(kept(out)) == 6 and before.items() <= kept(out).items()
    assert "over 3 seeds" in (out / "table.md").read_text()


def test_another_baseline_runs_nothing_and_turns_the_differences_round(
    finished: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    grid = write_grid(tmp_path, tiny_folder)
    result = invoke("compare", grid, "--output-dir", out, "--baseline", "flame")
    assert result.exit_code == 0, result.output
    assert "4 cells, 4 finished" in result.stdout
    assert losses_beyond(out, "fedavg") == [-value for value in losses_beyond(finished, "flame")]
    wrong = invoke("compare", grid, "--output-dir", out, "--baseline", "flam")
    assert wrong.exit_code == 2
    assert "grid: baseline = 'flam': must be one of the methods flame, fedavg" in wrong.stderr


def test_a_grid_that_shrank_and_grew_again_runs_nothing(
    finished: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    shutil.rmtree(out / "cells")  # as in a checkout that keeps the results alone
    for methods, seeds, cells in ((FEDAVG, "[1]", 1), (METHODS, "[0, 1]", 4)):
        result = invoke("compare", write_grid(tmp_path, tiny_folder, methods, seeds), "--output-dir", out)
        assert result.exit_code == 0, result.output
        assert f"{cells} cells, {cells} finished" in result.stdout
        assert (out / RESULTS).read_bytes() == (finished / RESULTS).read_bytes()
    assert (out / "table.md").read_bytes() == (finished / "table.md").read_bytes()


@pytest.mark.parametrize("option", [(), ("--dry-run",)])
def test_a_damaged_results_file_is_one_line_and_stays_as_it_is(
    finished: Path, tiny_folder: Path, tmp_path: Path, option: tuple[str, ...]
) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    damaged = (finished / RESULTS).read_bytes()[:-100]
    (out / RESULTS).write_bytes(damaged)
    result = invoke("compare", write_grid(tmp_path, tiny_folder), "--output-dir", out, *option)
    assert result.exit_code == 2
    assert result.stderr.startswith(
        f"fedflame: {out / RESULTS}:5: not the results of a cell: not JSON: Unter"
    )
    assert result.stderr.endswith("; delete the line to make it anew\n") and result.stderr.count("\n") == 1
    assert (out / RESULTS).read_bytes() == damaged


def start(grid: Path, out: Path) -> CliProcess:
    """`fedflame compare` as a process of its own."""
    return start_cli("compare", grid, "--output-dir", out)


def interrupt_here(grid: Path, out: Path) -> None:
    """Ctrl-C for a comparison in this process, whose cells need not import anything anew."""
    here, ended = os.getpid(), threading.Event()
    others, children = set(descendants(here)), list[int]()

    def press() -> None:
        while not ended.is_set() and not busy(out):
            time.sleep(0.002)
        children.extend(set(descendants(here)) - others)
        if not ended.is_set():
            os.kill(here, signal.SIGINT)

    before = {number: signal.getsignal(number) for number in SIGNALS}  # a command that was told leaves others
    # A shell's background jobs ignore SIGINT, and their children inherit it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    thread = threading.Thread(target=press)
    thread.start()
    try:
        result = invoke("compare", grid, "--output-dir", out)
    finally:
        ended.set()
        thread.join()
        for number, handler in before.items():
            signal.signal(number, handler)
    assert (result.exit_code, result.stderr) == (130, "fedflame: interrupted; the same command goes on\n")
    assert children
    wait_until_gone(children)


def busy(out: Path) -> bool:
    """Whether a cell is in the middle of its rounds."""
    done = kept(out)
    return any(
        metrics.parents[1].name not in done and b'"event": "round"' in metrics.read_bytes()
        for metrics in out.glob("cells/*/run/metrics.jsonl")
    )


def wait_for_cell(process: CliProcess, out: Path, begun: int) -> None:
    """Until so many cells are finished, at least, and another is in the middle of its rounds."""
    deadline = time.monotonic() + 200
    while True:
        if len(kept(out)) >= begun and busy(out):
            return
        assert process.poll() is None, "ended before it could be stopped"
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_with_bounds_the_tables_hold_what_clients_scored_and_nothing_runs_twice(
    tiny_folder: Path, tmp_path: Path
) -> None:
    grid = write_grid(tmp_path, tiny_folder, FEDAVG, "[0]")
    grid.write_text('bounds = ["standalone", "centralised"]\n' + grid.read_text())
    command = ("compare", grid, "--output-dir", tmp_path / "out", "--set", "server.num_server_rounds=1")
    result = invoke(*command, "--workers", 2)
    assert result.exit_code == 0, result.output
    assert "5 cells, 0 finished" in result.stdout
    table = (tmp_path / "out" / "table.md").read_text()
    _, _, bounds = table.partition("Response loss on each client's own held-out rows")
    lines = [line.split(" | ") for line in bounds.splitlines() if line.startswith("| Client ")]
    scored: dict[tuple[str, int], float] = {}
    for name, folder in cells(tmp_path / "out").items():
        for line in (folder / "run" / "metrics.jsonl").read_text().splitlines():
            event = json.loads(line)
            if event["event"] == "client_evaluation" and event["round"] == 1:
                scored[name.partition("-")[0], event["client"]] = event["loss"]
    assert len(scored) == 9 and [int(line[2]) for line in lines] == [4, 2, 1]
    for client, line in enumerate(lines):
        for method, cell in zip(("standalone", "fedavg", "centralised"), line[3:6], strict=True):
            assert cell == f"{scored[method, client]:.3f}"
    assert "Does federating help each client?" in (tmp_path / "out" / "report.html").read_text()
    assert "5 cells, 5 finished" in invoke(*command).stdout
    assert (tmp_path / "out" / "table.md").read_text() == table
