"""Processes that start in milliseconds: forked from one that has imported all and computed nothing.

A process that has computed must not be forked: torch's threads and a GPU do not survive it.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import tempfile
from typing import Any

from fedflame.errors import UserError

PRELOADED = ["fedflame.experiment.run"]
"""What the server imports once. The name is text: a room on a higher floor, which imports all below it."""

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Those that tell a command to end. Each may reach all processes of its group or control group."""


def leave_signals_to_main() -> None:
    """Let the main process decide what a signal ends: it kills this one, which has nothing to lose."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


LONGEST_TEMPORARY = 75
"""Bytes: the server's socket lies two levels below, and the path of a socket has at most 107."""


def process_context() -> Any:
    """The `multiprocessing` context for worker processes and for the cells of a comparison.

    macOS has none but `spawn`: forking is not safe once its frameworks are loaded.

    Raises:
        UserError: the path of the temporary folder is too long.
    """
    if sys.platform == "darwin":
        return multiprocessing.get_context("spawn")
    if len(os.fsencode(temporary := tempfile.gettempdir())) > LONGEST_TEMPORARY:
        raise UserError(
            f"TMPDIR {temporary} is too long for the socket of worker processes; "
            f"set it to a path of at most {LONGEST_TEMPORARY} letters, or use one worker"
        )
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context
