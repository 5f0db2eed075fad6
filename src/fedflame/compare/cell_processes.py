"""Run the cells of a comparison, each in a process of its own, several at a time.

Each cell has its own process, so that a cell that crashes cannot affect another. The processes are forked
from a server that has imported everything and computed nothing, so that a start takes milliseconds. Each
process ends when the main process does. A run may be killed at any time and goes on from its last round.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import sys
import threading
from collections import deque
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any, Protocol

from fedflame.atomic_file import write_atomically
from fedflame.base.files import model_config_path
from fedflame.clients.fork_server import leave_signals_to_main, process_context
from fedflame.compare.grid import Cell, Grid
from fedflame.compare.results import RESULTS, leave_result, read_results, take_over
from fedflame.cost.model_shape import read_model_shape
from fedflame.cost.run_cost import training_flops
from fedflame.errors import UserError
from fedflame.server.progress import LineReporter, Reporter

POLL_SECONDS = 0.5
STOP_SECONDS = 10.0


class Progress(Protocol):
    """Receives the progress of the cells."""

    def working(self, cells: Sequence[Cell]) -> None:
        """Report the cells that are running; called twice a second."""

    def ended(self, cell: Cell, failure: str | None) -> None:
        """Report that a cell has ended; `failure` is the reason if it has no results."""


def run_cells(grid: Grid, workers: int, progress: Progress) -> dict[str, str]:
    """Run the unfinished cells, `workers` at a time; the failure of one does not stop the others.

    The results of a cell are in the results file as soon as it ends. Returns the names of the failed cells ->
    why they failed. If an exception ends this function, the processes are stopped. Their cells go on from
    their last round when they are run again.
    """
    path = grid.output_dir / RESULTS
    results = take_over(path, read_results(path), grid.cells)
    waiting = deque(cell for cell in grid.cells if cell.name not in results)
    running: dict[Any, tuple[BaseProcess, Cell]] = {}
    failures: dict[str, str] = {}
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                process = _start(cell := waiting.popleft())
                running[process.sentinel] = process, cell
            progress.working([cell for _, cell in running.values()])
            for sentinel in wait(list(running), POLL_SECONDS):
                process, cell = running.pop(sentinel)
                process.join()
                results = take_over(path, results, [cell])
                failure = None if cell.name in results else _failure(cell, process)
                if failure:
                    failures[cell.name] = failure
                progress.ended(cell, failure)
    finally:
        for process, _ in running.values():
            process.kill()
        for process, _ in running.values():
            process.join(STOP_SECONDS)
    return failures


def failure_kept(cell: Cell) -> str | None:
    """Return why the last run of the cell failed, or None."""
    path = cell.folder / "error.txt"
    return path.read_text(encoding="utf-8").strip() if path.exists() else None


def _failure(cell: Cell, process: BaseProcess) -> str:
    return failure_kept(cell) or f"its process ended with exit code {process.exitcode}"


def _start(cell: Cell) -> BaseProcess:
    (cell.folder / "error.txt").unlink(missing_ok=True)
    process: BaseProcess = process_context().Process(target=_run_cell, args=(cell,), daemon=True)
    process.start()
    return process


def _run_cell(cell: Cell) -> None:
    """Run or resume a cell in its process; then leave its results, or error.txt if it failed."""
    leave_signals_to_main()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    cell.folder.mkdir(parents=True, exist_ok=True)
    with (cell.folder / "log.txt").open("ab") as log:
        os.dup2(log.fileno(), sys.stdout.fileno())
        os.dup2(log.fileno(), sys.stderr.fileno())
    try:
        _go_on(cell)
    except Exception as error:
        line = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        write_atomically(cell.folder / "error.txt", f"{line.partition(chr(10))[0]}\n".encode())
        raise


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _go_on(cell: Cell) -> None:
    # Imported here: the main process lists and reports cells without loading torch.
    import torch
    from transformers.utils import logging

    from fedflame.experiment.prepare import prepare
    from fedflame.experiment.run import Begun, run_experiment
    from fedflame.report.records import read_run

    def watch(begun: Begun) -> AbstractContextManager[Reporter]:
        return nullcontext(LineReporter(lambda text: print(text, flush=True)))

    torch.set_num_threads(1)  # always one, because the bytes depend on the number of threads
    logging.disable_progress_bar()
    begun = (cell.run / "config.json").exists()
    if not begun:
        shutil.rmtree(cell.run, ignore_errors=True)  # it was killed before its folder was complete
    run_experiment(prepare(cell.config, "resume" if begun else "refuse"), watch=watch)
    run = read_run(cell.run)
    leave_result(cell, run, _training_flops(cell, run.plan))


def _training_flops(cell: Cell, plan: dict[str, Any]) -> dict[int, float]:
    """Return k -> FLOPs per trained token, for every client's budget and for the model's K."""
    config = cell.config
    shape = read_model_shape(model_config_path(config.model.model_name_or_path))
    row = plan["sequence_length"], plan["labelled_share"]
    return {
        k: training_flops(config, shape, k, config.adapter.r, *row)
        for k in sorted({*config.afforded_experts(), shape.num_experts_per_tok}, reverse=True)
    }
