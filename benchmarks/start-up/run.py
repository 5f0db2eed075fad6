"""CPU seconds of commands that load no weights: each in a process of its own, five times, the median.

python benchmarks/start-up/run.py
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

RUNS = 5
SITE = """
name = "site-1"
[data]
dataset_name = "rows.jsonl"
[trainer]
active_experts = 4
"""
COMMANDS = (
    "--version",
    "--help",
    "site check site.toml",
    "hub check hub.toml",
    "run --set clients.active_experts=9",
    "run --data none.jsonl",
    "plan",
)


def cpu_seconds(command: str, folder: Path) -> float:
    """User and system time of one run of the command."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [sys.executable, "-m", "fedflame", *command.split()], cwd=folder, capture_output=True, check=False
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "site.toml").write_text(SITE)
        (folder / "hub.toml").write_text('sites = "a,b"\n[nvflare]\nadmin_kit = "kit"\n')
        (folder / "rows.jsonl").write_text('{"instruction": "a", "output": "b"}\n')
        taken: dict[str, list[float]] = {command: [] for command in COMMANDS}
        for _ in range(RUNS):
            for command, seconds in taken.items():
                seconds.append(cpu_seconds(command, folder))
    print("| command | CPU seconds, median | least | most |\n| --- | --- | --- | --- |")
    for command, seconds in taken.items():
        print(f"| `fedflame {command}` | {median(seconds):.2f} | {min(seconds):.2f} | {max(seconds):.2f} |")


if __name__ == "__main__":
    main()
