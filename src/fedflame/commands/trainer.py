"""`fedflame trainer`: the resident trainer of a site. systemd starts it again after a crash."""

from __future__ import annotations

import threading
from contextlib import suppress
from pathlib import Path

from rich.console import Console

from fedflame.commands.progress import say_line
from fedflame.trainer.site import load_site

SKIPPED_ROWS_SHOWN = 5


def run_trainer(site_file: Path, console: Console) -> None:
    """Serve the site until this process is told to end, by a KeyboardInterrupt.

    Args:
        site_file: the site's file.
        console: where lines go.

    Raises:
        UserError: the file, the device or the data cannot be used, or another trainer serves the site.
    """
    site = load_site(site_file)
    from fedflame.trainer.server import serve, sole_trainer
    from fedflame.trainer.service import TrainerService
    from fedflame.trainer.unix_socket import listening

    def say(text: str) -> None:
        say_line(console, text)

    with suppress(KeyboardInterrupt), sole_trainer(site):  # to end when it is told to is what a service does
        service = TrainerService(site, say)
        for row in service.skipped[:SKIPPED_ROWS_SHOWN]:
            say(f"skipped {row.where}: {row.reason}")
        with listening(site.socket_path) as listener:
            threading.Thread(target=serve, args=(listener, service, say), daemon=True).start()
            rows, k = service.num_examples, site.trainer.active_experts
            scored = f" and {service.test_rows} to score" if service.test_rows else ""
            say(f"{site.name}: {rows} rows{scored}, k = {k}, on {service.device.name}, at {site.socket_path}")
            threading.Event().wait()
