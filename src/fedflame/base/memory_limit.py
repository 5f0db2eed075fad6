"""How much memory this machine has for the frozen base."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
"""The limit of a container, in bytes or `max`, where the system has control groups (version 2)."""
HALF = 2
"""What training needs beside the base (adapter, gradients, optimizer, activations) is left the other half."""


def memory_limit() -> int:
    """Bytes of memory that the machine has, or that a container is given of it."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError, ValueError):
        return min(physical, int(CGROUP_LIMIT.read_text()))
    return physical


def is_short_of_memory(needed: int) -> bool:
    """Whether so many bytes of frozen weights take more than half of the memory."""
    return needed > memory_limit() // HALF
