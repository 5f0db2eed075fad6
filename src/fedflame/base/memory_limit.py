"""How much memory this machine has for the frozen base."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
"""The limit of a container, in bytes or `max`, where the system has control groups (version 2)."""
SHARE = 4
"""A base may take this part of the memory: worker processes hold one each, and training needs room beside
it. The number of processes does not count, since it must not change the bytes of a run: a product's last bit
may depend on where a weight lies."""


def memory_limit() -> int:
    """Bytes of memory that the machine has, or that a container is given of it."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError, ValueError):
        return min(physical, int(CGROUP_LIMIT.read_text()))
    return physical


def is_short_of_memory(needed: int) -> bool:
    """Whether so many bytes of frozen weights take more than their part of the memory."""
    return needed > memory_limit() // SHARE
