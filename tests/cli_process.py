"""`fedflame` as a process of its own whose stderr is kept and that can be killed at any instant."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from tests.preloaded import Fork, fork_server

from loopback import alive


class CliProcess(Fork):
    """One command, on as many threads as this process has."""

    def __init__(self, arguments: Sequence[str]) -> None:
        handle, name = tempfile.mkstemp(prefix="fedflame-stderr-")
        self._errors = Path(name)
        environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
        nowhere = os.open(os.devnull, os.O_RDWR)
        try:
            super().__init__(fork_server(), arguments, environment, [nowhere, nowhere, handle])
        finally:
            os.close(nowhere)
            os.close(handle)

    def stderr(self, timeout: float) -> str:
        """What it has said, once it has ended."""
        self.wait(timeout)
        return self._errors.read_text()


def wait_until_gone(children: Sequence[int]) -> None:
    """Until no process of these is left, after the one that started them was killed."""
    deadline = time.monotonic() + 60  # one that is still importing finds out when it is done
    while left := [child for child in children if alive(child)]:
        assert time.monotonic() < deadline, f"{left} are still there"
        time.sleep(0.02)
