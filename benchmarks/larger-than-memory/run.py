"""Train OLMoE-1B-7B in less memory than its weights take, and compare with all the memory there is.

    python benchmarks/larger-than-memory/run.py --folder DIR [--limits-gib 6,4] [--steps 3] [--json FILE]

Writes a random model of 13.8 GB into the folder once; every setting then trains in a process of its
own, in a control group of Linux that limits memory, page cache included. Needs the right to make
one, which root has.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from memory_group import MemoryGroup, memory_group
from write_model import drop_from_cache, write_model

from fedflame.experiment.environment import environment

TRAIN = Path(__file__).with_name("train.py")
GIB = 2**30
CHECKPOINTED_BELOW_GIB = 5
"""Gradient checkpointing saves 1 GB of activations, which a layer of weights then has to itself."""
COLUMNS = (
    *("k", "memory", "s/step", "CPU s/step", "of unlimited", "charged, GiB"),
    *("anonymous, GiB", "loss", "update", "touched"),
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True, help="where to write the model")
    parser.add_argument("--limits-gib", type=numbers, default=[6.0, 4.0])
    parser.add_argument("--active-experts", type=numbers, default=[1.0, 8.0])
    parser.add_argument(
        "--steps", type=int, default=3, help="the first one reads the model, and is not timed"
    )
    parser.add_argument("--json", type=Path, help="a file for the results; those in it are kept")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that no group is left behind
    if arguments.steps < 2:
        parser.error(f"--steps {arguments.steps}: 2 or more are needed, as the first one is not timed")
    with memory_group(None):
        pass  # before the model is written: exits where no group can be made
    write_model(arguments.folder)
    result = {"environment": environment() | {"threads": 1}, "steps": arguments.steps, "settings": []}
    if arguments.json and arguments.json.exists():
        result = json.loads(arguments.json.read_text())
    for k in map(int, arguments.active_experts):
        for limit in (None, *arguments.limits_gib):
            if not find(result["settings"], limit, k):
                result["settings"].append(measure(arguments.folder, limit, k, arguments.steps))
                if arguments.json:
                    arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result["settings"]))


def numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def measure(folder: Path, limit_gib: float | None, k: int, steps: int) -> dict[str, Any]:
    """Train in a process of its own; where the kernel kills it for its memory, say so."""
    print(f"k = {k}, {memory(limit_gib)}", file=sys.stderr, flush=True)
    drop_from_cache(folder)
    checkpointing = limit_gib is not None and limit_gib < CHECKPOINTED_BELOW_GIB
    setting = {
        "limit_gib": limit_gib,
        "active_experts": k,
        "gradient_checkpointing": checkpointing,
        "load_before": os.getloadavg()[0],
    }
    with memory_group(None if limit_gib is None else int(limit_gib * GIB)) as group:
        command = [sys.executable, str(TRAIN), str(folder), str(k), str(steps)]
        process = group.start(command + ["checkpointing"] * checkpointing, {"OMP_NUM_THREADS": "1"})
        try:
            watched = watch(process, group)
        finally:  # an interrupted program leaves none behind, which would keep the group alive
            process.kill()
            process.wait()
    if not watched["out_of_memory"] and process.returncode:
        raise SystemExit(f"k = {k}, {memory(limit_gib)}: the training ended with {process.returncode}")
    return setting | watched | {"load_after": os.getloadavg()[0]}


def watch(process: subprocess.Popen[bytes], group: MemoryGroup) -> dict[str, Any]:
    """Wait for the process: its result, the most that was charged, and its largest anonymous memory."""
    anonymous = 0
    while process.poll() is None:
        anonymous = max(anonymous, anonymous_bytes(process.pid))
        time.sleep(0.1)
    assert process.stdout is not None
    found = {
        "anonymous_bytes": anonymous,
        "charged_bytes": group.peak_bytes(),
        "out_of_memory": group.out_of_memory(),
    }
    return found if process.returncode else found | json.loads(process.stdout.read())


def anonymous_bytes(process: int) -> int:
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def table(settings: list[dict[str, Any]]) -> str:
    lines = [
        "| " + " | ".join(COLUMNS) + " |",
        "| --- " * len(COLUMNS) + "|",
    ]
    for setting in settings:
        unlimited = find(settings, None, setting["active_experts"])
        assert unlimited is not None, "the first of its k"
        lines.append("| " + " | ".join(cells(setting, unlimited)) + " |")
    return "\n".join(lines)


def cells(setting: dict[str, Any], unlimited: dict[str, Any]) -> list[str]:
    k, limit = setting["active_experts"], memory(setting["limit_gib"])
    if setting["gradient_checkpointing"]:
        limit += ", checkpointing"
    if setting["out_of_memory"]:
        return [str(k), limit, "**killed: out of memory**", *[""] * (len(COLUMNS) - 3)]
    seconds, most = (statistics.median(one["seconds"][1:]) for one in (setting, unlimited))
    equal = "same bits" if setting["digest"] == unlimited["digest"] else "**differs**"
    return [
        str(k),
        limit,
        f"{seconds:.1f}",
        f"{statistics.median(setting['cpu_seconds'][1:]):.1f}",
        f"{seconds / most:.2f}",
        f"{setting['charged_bytes'] / GIB:.2f}",
        f"{setting['anonymous_bytes'] / GIB:.2f}",
        f"{setting['loss']:.6f}",
        equal,
        f"{min(setting['touched']):.1%}",
    ]


def memory(limit_gib: float | None) -> str:
    return "unlimited" if limit_gib is None else f"{limit_gib:g} GiB"


def find(settings: list[dict[str, Any]], limit_gib: float | None, k: int) -> dict[str, Any] | None:
    same = [one for one in settings if (one["limit_gib"], one["active_experts"]) == (limit_gib, k)]
    return same[0] if same else None


if __name__ == "__main__":
    main()
