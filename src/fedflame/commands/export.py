"""`fedflame export`: a run's adapter for PEFT, or merged into a stock checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from fedflame.commands.progress import say_line
from fedflame.experiment.export import export_run

if TYPE_CHECKING:
    from fedflame.exports import Layout


def print_export(
    run: Path,
    to: Path,
    merge: bool,
    active_experts: int | None,
    layout: Layout | None,
    overwrite: bool,
    console: Console,
) -> None:
    """Write the export and say where it is; see `export_run`."""
    note = export_run(run, to, merge, active_experts, layout, overwrite)
    if note:
        say_line(console, note)
    say_line(console, f"written: {to}")
