"""Find out whether this machine has enough memory for the frozen base."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
"""File with the memory limit of a container, in bytes or `max` (control groups version 2)."""
SHARE = 4
"""The base may take a quarter of the memory: each worker process holds a base, and training needs room beside
it. The number of workers must not change this choice: the last bit of a product may depend on where a weight
lies in memory, and a run has the same bytes with any number of workers."""


def memory_limit() -> int:
    """Return the bytes of memory of this machine, or of its container."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError, ValueError):
        return min(physical, int(CGROUP_LIMIT.read_text()))
    return physical


def is_short_of_memory(needed: int) -> bool:
    """Return whether this many bytes of frozen weights take more than a quarter of the memory."""
    return needed > memory_limit() // SHARE
