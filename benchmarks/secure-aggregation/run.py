"""What masked sums cost: bytes, seconds and memory, with 6 and with 40 clients, of whom one may drop out.

    python benchmarks/secure-aggregation/run.py

One run of each case, in a process of its own.
"""

from __future__ import annotations

import multiprocessing
import platform
import resource
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fedflame
from fedflame.clients.answers import Answer, OnStep
from fedflame.clients.masked import MaskedClients
from fedflame.experiment.environment import environment
from fedflame.run_files.lines import read_lines

CLIENTS = (6, 40)
LOST = 1
"""The client that drops out."""
CASES = {
    "each update seen": {"secure_aggregation": False},
    "masked sums": {"secure_aggregation": True},
    "masked, one lost before the list": {"secure_aggregation": True},
    "masked, one lost after the list": {"secure_aggregation": True},
}


def config(clients: int, privacy: dict[str, Any], folder: str) -> dict[str, Any]:
    """Two rounds of two steps; one half of the clients trains with k = 8, the other with k = 2."""
    return {
        "output_dir": str(Path(folder) / "run"),
        "data": {"max_rows": 24 * clients},
        "clients": {
            "num_clients": clients,
            "active_experts": [8 if client < clients // 2 else 2 for client in range(clients)],
        },
        "strategy": {"clip": "none", "k_rotation": "none"},
        "training": {"max_steps": 2},
        "server": {"num_server_rounds": 2},
        "evaluation": {"rows_per_category": 1, "max_new_tokens": 0},
        "privacy": privacy,
    }


class Watched(MaskedClients):
    """Counts the seconds of masking, and loses a client in round 1 where it is told to."""

    lose = ""
    seconds: list[float] = []  # noqa: RUF012 # one run for each process
    rounds = 0

    def train(self, plans: Iterable[tuple[int, bytes]], on_step: OnStep) -> Iterator[Answer]:
        Watched.rounds += 1
        for client, answer in enumerate(super().train(plans, on_step)):
            lost = self.lose == "before" and client == LOST and self.rounds == 1
            yield replace(answer, failure="lost") if lost else answer

    def sums(self, requests: Iterable[tuple[int, bytes]]) -> Iterator[Answer]:
        for client, request in requests:
            begun = time.process_time()
            (answer,) = super().sums([(client, request)])
            self.seconds.append(time.process_time() - begun)
            lost = self.lose == "after" and client == LOST and self.rounds == 1
            yield replace(answer, failure="lost") if lost else answer


def measured(clients: int, case: str) -> dict[str, Any]:
    """One run, in a process of its own."""
    import fedflame.experiment.run as running

    Watched.lose = next((when for when in ("before", "after") if when in case), "")
    running.MaskedClients = Watched  # type: ignore[misc]
    with tempfile.TemporaryDirectory() as folder:
        begun = time.process_time()
        fedflame.run(config(clients, CASES[case], folder))
        spent = time.process_time() - begun
        events = list(read_lines(Path(folder) / "run" / "metrics.jsonl"))
        updates = [event for event in events if event["event"] == "client"]
        rounds = [event["clients"] for event in events if event["event"] == "round"]
    return {
        "cpu": spent,
        "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "bytes_up": sum(event["bytes_up"] for event in updates) / max(1, len(updates)),
        "masking": sorted(Watched.seconds)[len(Watched.seconds) // 2] if Watched.seconds else 0.0,
        "clients": rounds,
    }


def main() -> None:
    print("| clients | case | MB up, each | ms to mask, each | CPU s | peak MB | clients used by round |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for clients in CLIENTS:
        for case in CASES:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                found = pool.apply(measured, (clients, case))
            used = " and ".join(map(str, found["clients"]))
            cells = f"{found['bytes_up'] / 1e6:.2f} | {1e3 * found['masking']:.0f} | {found['cpu']:.0f}"
            print(f"| {clients} | {case} | {cells} | {found['memory'] / 1e6:.0f} | {used} |", flush=True)
    known = environment()
    print(f"\n(Python {platform.python_version()}, torch {known['torch']})")


if __name__ == "__main__":
    main()
