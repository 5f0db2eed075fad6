"""The process of one tracker: it sends each round that the run folder keeps, until the run's process ends."""

from __future__ import annotations

import fcntl
import os
import select
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

from fedflame.checked_json import read_checked, write_checked
from fedflame.config.settings import flat
from fedflame.errors import UserError, one_line
from fedflame.run_files import ADVICE
from fedflame.run_files.checkpoints import last_kept
from fedflame.run_files.lines import FILE_NAME, START, Place, read_on
from fedflame.trackers.metrics import round_metrics, step_metrics
from fedflame.trackers.sinks import SINKS, TrackedRun

FOLDER = "trackers"
"""The folder of the run folder with what each tracker has."""
ANSWER_SECONDS = 60
"""A tracker that takes longer to answer has its process ended, by SIGALRM."""
UNCOUNTED_STEPS = 100
"""Steps of a round on the axis of a tracker, where epochs decide how many each client takes."""
_LOOK_SECONDS = 0.5


def follow(tracker: str, run: Path, name: str) -> int:
    """Report a run until stdin ends, and return the exit code. Why it failed is one line on stdout.

    Everything else that the tracker writes to stdout goes to stderr.
    """
    answer = os.dup(1)
    os.dup2(2, 1)
    try:
        with _sole(run / FOLDER / f"{tracker}.lock"):
            _report(tracker, run, name)
    except Exception as error:  # whatever a tracker raises
        reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        os.write(answer, one_line(reason).encode())
        return 1
    return 0


def _report(tracker: str, run: Path, name: str) -> None:
    state = run / FOLDER / f"{tracker}.json"
    known: dict[str, Any] = read_checked(state, ADVICE) if state.exists() else {"id": "", "round": -1}
    config = flat(read_checked(run / "config.json", ADVICE))
    steps = UNCOUNTED_STEPS if config.get("training.num_train_epochs") else config["training.max_steps"]
    with _in_time():
        opened = TrackedRun(run, name, config, known["id"], known["round"] + 1, steps)
        sink = SINKS[tracker](opened)  # type: ignore[index] # a name of the configuration
    write_checked(state, {"id": sink.id, "round": sink.first_round - 1})
    place, last = START, sink.first_round - 1
    ended = stopped = False
    while not ended:
        ended = _stdin_ends_within(_LOOK_SECONDS)
        events, place = _kept_after(run, place)
        for number, of_round in groupby(events, key=lambda event: event["round"]):
            lines = list(of_round)
            stopped = any(event["event"] == "stopped" for event in lines)
            if number > last:
                by_step = step_metrics(lines, number, steps)
                whole = {**round_metrics(lines), "round": number}
                by_step[number * steps] = by_step.get(number * steps, {}) | whole
                with _in_time():
                    sink.log(by_step)
                last = number
                write_checked(state, {"id": sink.id, "round": last})
    with _in_time():
        sink.close(finished=stopped or last == config["server.num_server_rounds"])


def _kept_after(run: Path, place: Place) -> tuple[list[dict[str, Any]], Place]:
    """Return the events after a place up to the last checkpoint: no later line can still be taken back."""
    kept = last_kept(run)
    return read_on(run / FILE_NAME, place, kept.metrics_bytes) if kept else ([], place)


def _stdin_ends_within(seconds: float) -> bool:
    """Return whether the other end of stdin is closed, by hand or with its process. Nothing is sent there."""
    return bool(select.select([sys.stdin], [], [], seconds)[0])


@contextmanager
def _in_time() -> Iterator[None]:
    """End this process unless the block ends in time. SIGALRM does so also where a tracker never returns."""
    signal.alarm(ANSWER_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)


@contextmanager
def _sole(lock: Path) -> Iterator[None]:
    """Wait for the process that reported this run until it was resumed, if it still sends rounds."""
    lock.parent.mkdir(exist_ok=True)
    with lock.open("a") as file:
        with _in_time():
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
