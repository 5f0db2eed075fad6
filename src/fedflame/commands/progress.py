"""Progress on the console: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fedflame.experiment.used_model import used_rounds
from fedflame.run_files.checkpoints import kept_round
from fedflame.run_files.standing import in_words
from fedflame.server.progress import LineReporter, Reporter


def say_line(console: Console, text: str) -> None:
    """Print a text as it is: no markup, no colours, no line breaks of the console's own."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def say_used_rounds(run: Path, console: Console) -> None:
    """Say which round is used at each k, where that is its best one."""
    if rounds := used_rounds(run):
        say_line(console, f"best rounds, which are used: {in_words(rounds, kept_round(run))}")


class BarReporter(LineReporter):
    """A live bar over all batches of the run, with the clients at work and their tokens/s."""

    def __init__(self, console: Console, progress: Progress, total_batches: int) -> None:
        super().__init__(lambda text: say_line(console, text))
        self._progress = progress
        self._task = progress.add_task("", total=total_batches, clients="", speed="")
        self._working: dict[str, str] = {}
        self._tokens, self._start = 0, time.monotonic()

    def start_client(self, round_number: int, name: str, active_experts: int) -> None:
        if not self._working:
            self._tokens, self._start = 0, time.monotonic()
        self._working[name] = f"{name} (k={active_experts})"
        text = f"round {round_number}: {', '.join(self._working.values())}"
        self._progress.update(self._task, clients=text)

    def end_client(self, name: str) -> None:
        del self._working[name]

    def step(self, tokens: int) -> None:
        self._tokens += tokens
        speed = self._tokens / (time.monotonic() - self._start)
        self._progress.update(self._task, advance=1, speed=f"{speed:,.0f} tokens/s")


@contextmanager
def reporter(console: Console, total_batches: int) -> Iterator[Reporter]:
    """A live bar on a terminal, plain lines otherwise."""
    if not console.is_terminal:
        yield LineReporter(lambda text: say_line(console, text))
        return
    columns = (
        TextColumn("{task.fields[clients]}"),
        BarColumn(),
        TextColumn("{task.fields[speed]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        yield BarReporter(console, progress, total_batches)
