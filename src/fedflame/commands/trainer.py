"""The resident trainer of a site, from its file."""

from __future__ import annotations

import signal
import sys
import threading
from pathlib import Path
from types import FrameType

from rich.console import Console

from fedflame.tracking import LineReporter
from fedflame.trainer.site import load_site
from fedflame.trainer.supervisor import supervise

SKIPPED_ROWS_SHOWN = 5


def run_trainer(site_file: Path, once: bool, console: Console) -> None:
    """Serve the site until this process is told to end.

    Args:
        site_file: the site's file.
        once: in this process; without it, in one that is started again when it crashes.
        console: where lines go.

    Raises:
        UserError: the file or the data cannot be used, another trainer serves the site, or it crashes
            again and again.
    """
    say = LineReporter(console).message
    site = load_site(site_file)
    if not once:
        signal.signal(signal.SIGTERM, _interrupt)
        command = [sys.executable, "-m", "fedflame", "trainer", "--site", str(site_file), "--once"]
        supervise(command, say)
        return
    from fedflame.trainer.server import serve, sole_trainer
    from fedflame.trainer.service import TrainerService
    from fedflame.wire.unix_socket import listening

    with sole_trainer(site):
        service = TrainerService(site, say)
        for row in service.skipped[:SKIPPED_ROWS_SHOWN]:
            say(f"skipped {row.where}: {row.reason}")
        with listening(site.socket_path) as listener:
            threading.Thread(target=serve, args=(listener, service, say), daemon=True).start()
            rows, k = service.num_examples, site.trainer.active_experts
            say(f"{site.name}: {rows} rows, k = {k}, at {site.socket_path}")
            _wait_for_the_end()


def _wait_for_the_end() -> None:
    """Until SIGTERM or SIGINT."""
    end = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: end.set())
    end.wait()


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
