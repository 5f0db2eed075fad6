"""A control group of Linux that limits the memory of one process, page cache included.

With cgroup v1 the group is made below that of this process; with v2 beside it, as a group with
processes in it has no others below. So every limit that holds for this process still holds.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
V1 = {
    "limit": "memory.limit_in_bytes",
    "with_swap": "memory.memsw.limit_in_bytes",
    "peak": "memory.max_usage_in_bytes",
    "events": "memory.oom_control",
}
V2 = {"limit": "memory.max", "with_swap": "memory.swap.max", "peak": "memory.peak", "events": "memory.events"}


@dataclass(frozen=True)
class MemoryGroup:
    """A folder of the kernel's control group file system, and how its files are called."""

    folder: Path
    files: dict[str, str]

    def start(self, command: Sequence[str], environment: dict[str, str]) -> subprocess.Popen[bytes]:
        """Start a program within the group; its standard output is a pipe."""
        members = self.folder / "cgroup.procs"
        return subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            env=os.environ | environment,
            preexec_fn=lambda: members.write_text("0"),  # 0 is the one who writes
        )

    def peak_bytes(self) -> int:
        """The most that was charged at a time."""
        return int((self.folder / self.files["peak"]).read_text())

    def out_of_memory(self) -> bool:
        """Whether the kernel killed a process of the group for its limit."""
        lines = (self.folder / self.files["events"]).read_text().splitlines()
        return any(line.startswith("oom_kill ") and not line.endswith(" 0") for line in lines)


@contextmanager
def memory_group(limit: int | None) -> Iterator[MemoryGroup]:
    """A group for the block, limited to so many bytes without swap. Exits where none can be made."""
    parent, files = _parent()
    folder = parent / f"larger-than-memory-{os.getpid()}"
    try:
        folder.mkdir()
    except OSError as error:
        raise SystemExit(
            f"{parent}: no control group of memory can be made here ({error.strerror})"
        ) from error
    try:
        if limit is not None:
            (folder / files["limit"]).write_text(str(limit))
            if (folder / files["with_swap"]).exists():  # else the kernel counts no swap
                (folder / files["with_swap"]).write_text(str(limit) if files is V1 else "0")
        yield MemoryGroup(folder, files)
    finally:
        folder.rmdir()


def _parent() -> tuple[Path, dict[str, str]]:
    """Where to make a group, by the lines `number:controllers:path` of /proc/self/cgroup."""
    lines = Path("/proc/self/cgroup").read_text().splitlines() if ROOT.exists() else []
    groups = {
        controllers: path.lstrip("/") for _, controllers, path in (line.split(":", 2) for line in lines)
    }
    if "memory" in groups:
        return ROOT / "memory" / groups["memory"], V1
    if (ROOT / "cgroup.controllers").exists():
        return ROOT / Path(groups[""]).parent, V2
    raise SystemExit("the memory of a process can be limited by Linux alone, with control groups")
