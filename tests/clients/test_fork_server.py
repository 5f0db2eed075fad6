"""The process that others are forked from must not know CUDA: a fork of one that does cannot use a card."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from fedflame.clients.fork_server import LONGEST_TEMPORARY, PRELOADED, process_context
from fedflame.errors import UserError

CHILD = f"""
import gc, importlib, traceback
gc.disable()  # so that importing takes less
import torch

def refuse(*arguments, **settings):
    traceback.print_stack()
    raise SystemExit("CUDA was asked")

for name in ("is_available", "device_count", "init", "_lazy_init", "current_device", "get_device_properties"):
    setattr(torch.cuda, name, refuse)
for name in {PRELOADED!r}:
    importlib.import_module(name)
print("quiet")
"""


@pytest.mark.slow
def test_what_is_imported_before_the_fork_asks_nothing_of_cuda() -> None:
    done = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, timeout=120)
    assert done.stdout == "quiet\n", done.stderr
    assert all(importlib.import_module(name) for name in PRELOADED)


BIND = """
import socket
from multiprocessing.connection import arbitrary_address
socket.socket(socket.AF_UNIX).bind(arbitrary_address("AF_UNIX"))
"""


@pytest.mark.skipif(sys.platform == "darwin", reason="it spawns processes")
def test_a_temporary_folder_with_a_longer_path_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as parent:
        longest = Path(parent) / ("a" * (LONGEST_TEMPORARY - len(parent) - 1))
        longest.mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(longest))
        process_context()
        subprocess.run([sys.executable, "-c", BIND], env=os.environ | {"TMPDIR": str(longest)}, check=True)
    monkeypatch.setattr(tempfile, "tempdir", f"{longest}b")
    with pytest.raises(UserError, match=rf"TMPDIR {longest}b is too long .* at most {LONGEST_TEMPORARY}"):
        process_context()
