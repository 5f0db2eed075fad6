"""Which of the jobs that are over stay, at the hub and in each site's kit: the last ones, for a look at them.

A run leaves a job or more, and each job a folder with configuration and logs. nvflare deletes none.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fedflame.engines.nvflare.job import NAME

KEPT = 10
"""The last jobs, however they ended."""
KEPT_SECONDS = 86400.0
"""A folder in which something was written since then stays, too: its job may still run."""
_JOB = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def superfluous_jobs(listed: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return which of our jobs that nvflare lists may go from the hub's store; the oldest first."""
    ours = [job for job in listed if job.get("job_name") == NAME]
    ours.sort(key=lambda job: str(job.get("submit_time")))
    over = [job for job in ours if str(job.get("status")).startswith("FINISHED")]
    return [str(job["job_id"]) for job in over[: max(0, len(ours) - KEPT)]]


def superfluous_folders(kit: Path, now: float) -> list[Path]:
    """Return the folders in a kit that our earlier jobs left and that may go."""
    ours = sorted(((_last_written(path), path) for path in kit.iterdir() if _is_ours(path)), reverse=True)
    return [path for written, path in ours[KEPT:] if now - written > KEPT_SECONDS]


def prune_kit(kit: Path) -> None:
    """Remove these folders from a kit; what cannot be removed stays."""
    for folder in superfluous_folders(kit, time.time()):
        shutil.rmtree(folder, ignore_errors=True)


def _is_ours(path: Path) -> bool:
    if not _JOB.fullmatch(path.name) or path.is_symlink() or not path.is_dir():
        return False
    try:
        meta = json.loads((path / "meta.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(meta, dict) and meta.get("name") == NAME


def _last_written(folder: Path) -> float:
    return max((path.stat().st_mtime for path in folder.iterdir()), default=folder.stat().st_mtime)
