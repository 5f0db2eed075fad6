"""The most memory that a block of work took."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch

_PROCESS = Path("/proc/self")


def forget_peak(devices: Sequence[torch.device]) -> None:
    """Begin to measure anew."""
    for device in devices:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
    with suppress(OSError):
        (_PROCESS / "clear_refs").write_text("5")  # Linux: the peak is then what is held now, proc(5)


def peak_memory(devices: Sequence[torch.device]) -> int | None:
    """Return the most bytes since `forget_peak`.

    On cards that is what torch held on all of them, weights included. On a CPU it is the resident size of the
    process, where the system tells it (Linux), else None.
    """
    cards = [device for device in devices if device.type == "cuda"]
    if cards:
        return sum(torch.cuda.max_memory_allocated(card) for card in cards)
    with suppress(OSError):
        if found := re.search(r"VmHWM:\s+(\d+) kB", (_PROCESS / "status").read_text()):
            return 1024 * int(found[1])
    return None
