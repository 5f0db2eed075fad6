"""`fedflame export`: a run's adapter for PEFT, or merged into a stock checkpoint."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from fedflame.commands.progress import say_line, say_used_rounds
from fedflame.experiment.export import ExportOptions, export_run


def print_export(run: Path, to: Path, options: ExportOptions, console: Console) -> None:
    """Write the export and say where it is; see `export_run`."""
    for note in export_run(run, to, options):
        say_line(console, note)
    say_used_rounds(run, console)
    say_line(console, f"written: {to}")
