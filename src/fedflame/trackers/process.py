"""Start the processes of a run's trackers, notice those that fail, and end them all in bounded time."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from fedflame.config.words import Tracker
from fedflame.errors import UserError, one_line
from fedflame.trackers.follow import ANSWER_SECONDS

END_SECONDS = 30.0
"""How long the end of a run waits for all its trackers together."""
_LONGEST_REASON = 8192

Look = Callable[[], None]
"""Notices trackers that have failed since the last call. It costs a system call for each tracker."""


def require_installed(trackers: Sequence[Tracker]) -> None:
    """Raise UserError where the package of a tracker is not installed."""
    for name in trackers:
        found = importlib.util.find_spec(name)
        if found is None or found.origin is None:  # a folder of that name is no package
            raise UserError(f"report_to: {name} is not installed; pip install 'fedflame[{name}]'")


@contextmanager
def reporting(
    trackers: Sequence[Tracker], run: Path, name: str, warn: Callable[[str], None]
) -> Iterator[Look]:
    """Report the run in this folder while the block goes on.

    A tracker that fails, or that does not end in time, costs one line and nothing else.

    Args:
        trackers: the names of the trackers.
        run: the run folder, with its config.json.
        name: what the run is called in the trackers.
        warn: called with that line.
    """
    started: dict[Tracker, subprocess.Popen[bytes]] = {}

    def look() -> None:
        for tracker in [tracker for tracker, process in started.items() if process.poll() is not None]:
            warn(f"warning: {tracker} is off: {_reason(started.pop(tracker))}")

    with ExitStack() as pipes:
        for tracker in trackers:
            try:
                started[tracker] = process = _start(tracker, run, name)
            except OSError as error:
                warn(f"warning: {tracker} is off: its process cannot be started: {error.strerror}")
            else:
                for pipe in filter(None, (process.stdin, process.stdout)):
                    pipes.enter_context(pipe)
        try:
            yield look
        finally:
            look()
            _end(started, warn)


def _start(tracker: Tracker, run: Path, name: str) -> subprocess.Popen[bytes]:
    """Start a process with the modules that this one finds, out of reach of a Ctrl-C at the terminal."""
    places = os.pathsep.join(place for place in sys.path if place)
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "fedflame.trackers", tracker, str(run.absolute()), name],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": places},
        start_new_session=True,
    )


def _end(started: Mapping[Tracker, subprocess.Popen[bytes]], warn: Callable[[str], None]) -> None:
    """Let the processes send what is left, and end those that take too long."""
    for process in started.values():
        if process.stdin is not None:
            process.stdin.close()
    deadline = time.monotonic() + END_SECONDS
    for tracker, process in started.items():
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            warn(f"warning: {tracker} is off: it did not end within {END_SECONDS:g} s")
            continue
        if process.returncode:
            warn(f"warning: {tracker} is off: {_reason(process)}")


def _reason(process: subprocess.Popen[bytes]) -> str:
    """Return why a process has ended: what it said, or else its exit code."""
    said = os.read(process.stdout.fileno(), _LONGEST_REASON) if process.stdout else b""
    if said:
        return one_line(said.decode(errors="replace"))
    if process.returncode == -signal.SIGALRM:
        return f"it did not answer within {ANSWER_SECONDS} s"
    return f"its process ended with code {process.returncode}"
