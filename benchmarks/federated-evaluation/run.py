"""Bytes to the clients of a run that asks them to score the model, and of one that does not.

    python benchmarks/federated-evaluation/run.py

Each plan counts as it would travel to a site: as its difference to the last plan that the site has answered.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import fedflame
from fedflame.clients.answers import Answer, OnStep
from fedflame.clients.local import LocalClients
from fedflame.wire.addition import encode_addition
from fedflame.wire.codec import asks_for_scores
from fedflame.wire.frame import opened
from fedflame.wire.packed_header import read_packed_header

RUN = {
    "data": {"max_rows": 400},
    "training": {"max_steps": 2},
    "server": {"num_server_rounds": 4},
    "evaluation": {"rows_per_category": 1, "max_new_tokens": 0, "client_test_size": 0.2},
}
METHODS = {
    "flame, the default": {},
    "flame, k_rotation = none": {"k_rotation": "none"},
    "fedavg": {"name": "fedavg"},
}


@contextmanager
def counted(sent: dict[bool, list[int]]) -> Iterator[None]:
    """Add the bytes of each plan to those of evaluations (True) or of training (False)."""
    answer, held = LocalClients.answer, dict[int, bytes]()

    def noted(self: LocalClients, plan: bytes, on_step: OnStep) -> Answer:
        client = int(read_packed_header(opened(plan))["client"])
        before = held.get(client)
        addition = encode_addition(_writable(plan), _writable(before)) if before else None
        sent[asks_for_scores(plan)].append(len(addition or plan))
        held[client] = plan
        return answer(self, plan, on_step)

    LocalClients.answer = noted  # type: ignore[method-assign]
    try:
        yield
    finally:
        LocalClients.answer = answer  # type: ignore[method-assign]


def _writable(plan: bytes) -> memoryview:
    return memoryview(bytearray(plan))


def main() -> None:
    print("| method | training alone, MB | with evaluations, MB | of these in plans of training |")
    print("| --- | --- | --- | --- |")
    for method, strategy in METHODS.items():
        totals = []
        for share in (0, 1):
            sent: dict[bool, list[int]] = {False: [], True: []}
            with tempfile.TemporaryDirectory() as folder, counted(sent):
                config = RUN | {"strategy": strategy, "output_dir": str(Path(folder) / "run")}
                config["server"] = {"num_server_rounds": 4, "fraction_evaluate": share}
                fedflame.run(config)
            totals.append((sum(sent[False]), sum(sent[True])))
        (alone, _), (training, scores) = totals
        print(f"| {method} | {alone / 1e6:.1f} | {(training + scores) / 1e6:.1f} | {training / 1e6:.1f} |")


if __name__ == "__main__":
    main()
