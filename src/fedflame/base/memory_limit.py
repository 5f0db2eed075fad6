"""Find out whether this machine has enough memory for the frozen base."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
"""File with the memory limit of a container, in bytes or `max` (control groups version 2)."""
HALF = 2
"""The base may take half of the memory; adapter, gradients, optimizer and activations have the other half."""


def memory_limit() -> int:
    """Return the bytes of memory of this machine, or of its container."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError, ValueError):
        return min(physical, int(CGROUP_LIMIT.read_text()))
    return physical


def is_short_of_memory(needed: int) -> bool:
    """Return whether this many bytes of frozen weights take more than half of the memory."""
    return needed > memory_limit() // HALF
