"""Peak memory of `fedflame run` with 40 and with 400 clients, in one process and with two workers.

    python benchmarks/many-clients/run.py --output benchmarks/many-clients/results/cpu.json

The embedded model and the same generated rows in every run, so that nothing but the number of clients
differs: each trains one step of two rows in each of two rounds, and all of them take part in both. A peak
is the most resident memory that a process had, as Linux knows it (VmHWM).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedflame.experiment.environment import environment

FEW, MANY = 40, 400
SETTINGS = (
    "data.max_rows=1600",
    "data.partition=iid",
    "data.max_length=64",
    "training.max_steps=1",
    "training.per_device_train_batch_size=2",
    "server.num_server_rounds=2",
    "server.fraction_train=1.0",
    "evaluation.rows_per_category=1",
    "evaluation.max_new_tokens=1",
    "evaluation.generate_every=0",
)
SAMPLE_SECONDS = 0.05


def command(clients: int, workers: int, folder: Path) -> list[str]:
    overrides = [*SETTINGS, f"clients.num_clients={clients}"]
    settings = [word for override in overrides for word in ("--set", override)]
    return [sys.executable, "-m", "fedflame", "run", *settings,
            "--workers", str(workers), "--output-dir", str(folder / "run")]  # fmt: skip


def peak_megabytes(pid: int) -> float:
    """Of a process that may have ended: 0 then."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024 / 1e6


def children(pid: int) -> list[int]:
    found: list[int] = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found += map(int, path.read_text().split())
        except OSError:
            continue
    return found


def measure(clients: int, workers: int) -> dict[str, Any]:
    """The peaks of a run's processes, seen until they end."""
    peaks: dict[int, float] = {}
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fedflame-many-") as name, Path(name, "log").open("w+") as log:
        run = subprocess.Popen(
            command(clients, workers, Path(name)), env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=log, stderr=log,
        )  # fmt: skip
        while run.poll() is None:
            for pid in (run.pid, *children(run.pid)):
                peaks[pid] = max(peaks.get(pid, 0.0), peak_megabytes(pid))
            time.sleep(SAMPLE_SECONDS)
        if run.returncode:
            log.seek(0)
            raise SystemExit(log.read())
        metrics = [json.loads(line) for line in Path(name, "run", "metrics.jsonl").read_text().splitlines()]
    main = peaks.pop(run.pid)
    # The main process is the first worker. A smaller process is multiprocessing's own, which holds no model.
    workers_peaks = sorted(peaks.values())[1 - workers :] if workers > 1 else []
    return {
        "clients": clients,
        "workers": workers,
        "main_megabytes": round(main, 1),
        "worker_megabytes": [round(peak, 1) for peak in workers_peaks],
        "updates": sum(event["event"] == "client" for event in metrics),
        "seconds": round(time.monotonic() - begun, 1),
    }


def ratios(runs: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Peak with many clients over that with few, of each kind of process."""
    found = {}
    by_setting = {(run["workers"], run["clients"]): run for run in runs}
    for workers in sorted({run["workers"] for run in runs}):
        few, many = by_setting[workers, FEW], by_setting[workers, MANY]
        found[f"main, --workers {workers}"] = round(many["main_megabytes"] / few["main_megabytes"], 3)
        if workers > 1:
            largest = max(many["worker_megabytes"]), max(few["worker_megabytes"])
            found[f"worker, --workers {workers}"] = round(largest[0] / largest[1], 3)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workers", default="1,2", help="settings of --workers, comma-separated")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    runs = []
    for workers in map(int, given.workers.split(",")):
        for clients in (FEW, MANY):
            runs.append(measure(clients, workers))
            print(json.dumps(runs[-1]), flush=True)
    result = {"ratios": ratios(runs), "runs": runs, "settings": SETTINGS, "environment": environment()}
    if given.output:
        given.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["ratios"], indent=1))


if __name__ == "__main__":
    main()
