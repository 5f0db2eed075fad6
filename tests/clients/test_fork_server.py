"""The process that others are forked from must not know CUDA: a fork of one that does cannot use a card."""

from __future__ import annotations

import importlib
import subprocess
import sys

from fedflame.clients.fork_server import PRELOADED

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


def test_what_is_imported_before_the_fork_asks_nothing_of_cuda() -> None:
    done = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, timeout=120)
    assert done.stdout == "quiet\n", done.stderr
    assert all(importlib.import_module(name) for name in PRELOADED)
