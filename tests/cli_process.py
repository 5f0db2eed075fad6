"""`fedflame` as a process of its own that starts in milliseconds and can be killed at any instant."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from fedflame.clients.fork_server import process_context


class CliProcess:
    """One command, forked from a process that has imported all: its exit code, signals and stderr."""

    def __init__(self, arguments: Sequence[str]) -> None:
        handle, name = tempfile.mkstemp(prefix="fedflame-stderr-")
        os.close(handle)
        self._errors = Path(name)
        arguments_of_main = (list(arguments), name, torch.get_num_threads())
        self._process = process_context().Process(target=_main, args=arguments_of_main)
        self._process.start()

    @property
    def pid(self) -> int:
        pid = self._process.pid
        assert pid is not None
        return pid

    @property
    def returncode(self) -> int | None:
        """As of `subprocess.Popen`: negative for a signal."""
        code: int | None = self._process.exitcode
        return code

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float) -> int:
        self._process.join(timeout)
        assert self.returncode is not None, f"still running after {timeout} s"
        return self.returncode

    def send_signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def stderr(self, timeout: float) -> str:
        """What it has said, once it has ended."""
        self.wait(timeout)
        return self._errors.read_text()


def _main(arguments: list[str], errors: str, threads: int) -> None:
    for number, path in ((1, os.devnull), (2, errors)):
        opened = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.dup2(opened, number)
        os.close(opened)
    # A shell's background jobs ignore SIGINT, and their children inherit it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(threads)
    sys.argv = ["fedflame", *arguments]
    from fedflame.cli import app

    app(arguments, prog_name="fedflame")
