"""The report of a run: one self-contained HTML page, made only from the run folder."""

from __future__ import annotations

from pathlib import Path

from fedflame.atomic_file import write_atomically
from fedflame.report.page import page
from fedflame.report.records import read_run


def write_report(run: Path) -> Path:
    """Write `report.html` into the run folder and return its path.

    The report of an unfinished run shows what is recorded so far.

    Raises:
        UserError: `run` is not a run folder, or a file in it is damaged.
    """
    target = run / "report.html"
    write_atomically(target, page(read_run(run)).encode())
    return target
