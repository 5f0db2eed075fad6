"""`fedflame watch`: a run in progress, or what a site's trainer does, as a live page."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from rich.console import Console

from fedflame.commands.progress import say_line
from fedflame.page_server import PageServer
from fedflame.report.live import live_page

SITE_FILE = "site.toml"


def watch(place: Path, port: int, console: Console) -> None:
    """Serve the page of a run folder or of a site until this process is told to end.

    Args:
        place: a run folder, a site's file, or a folder with a site.toml.
        port: of the loopback interface; 0: a free one.
        console: where the address goes.

    Raises:
        UserError: the place is none of these, or the port cannot be used.
    """
    page = _page_of(place)
    with suppress(KeyboardInterrupt), PageServer(page, port) as server:
        say_line(console, f"{place}: {server.address} (Ctrl-C ends it)")
        server.serve_forever()


def _page_of(place: Path) -> Callable[[], str]:
    file = place / SITE_FILE if place.is_dir() else place
    if not file.is_file():
        return live_page(place)
    from fedflame.trainer.page import live_site_page

    return live_site_page(file)
