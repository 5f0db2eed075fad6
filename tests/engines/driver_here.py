"""A driver over an engine of threads, and sites whose answers are a few bytes, no update."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.engines_here import Deliver, ThreadEngine

from fedflame.clients.answers import Answer
from fedflame.engines.clients import EngineClients
from fedflame.engines.hub import HubRounds
from fedflame.engines.jobs import engine_jobs
from fedflame.wire.envelope import Envelope

SITES = ["north", "south", "west"]
RUN = "0123456789abcdef" * 2
LARGE = (3, 40, 4, 30, 20)
"""Of an adapter beside which names and scalars are little."""


def answer(request: bytes, **changes: Any) -> bytes:
    """What an honest site says, or with other fields."""
    asked = Envelope.from_bytes(request)
    header = {name: asked.header[name] for name in ("ticket", "run", "site")}
    header |= {"kind": "update", "steps": 2, "tokens": 10} | changes
    return Envelope(header, b"learned from " + asked.body).to_bytes()


def honest(site: str, request: bytes) -> bytes:
    return answer(request)


DESCRIPTION = {
    "kind": "description",
    "num_examples": 7,
    "active_experts": 2,
    "max_active_experts": 2,
    "held": "",
}


def described(request: bytes, **changes: Any) -> bytes:
    """What an honest site says of itself, or with other fields."""
    return answer(request, **{**DESCRIPTION, **changes})


@dataclass
class Driver:
    clients: EngineClients
    engine: ThreadEngine
    said: list[str] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)

    def round(self) -> list[Answer]:
        plans = [(client, f"plan {client}".encode()) for client in range(len(SITES))]
        return list(self.clients.train(plans, self.tokens.append))

    def heard(self, words: str) -> bool:
        return any(words in line for line in self.said)


@contextmanager
def driver(
    deliver: Deliver,
    tmp_path: Path,
    quorum: int = 1,
    engine: type[ThreadEngine] = ThreadEngine,
    **rounds: Any,
) -> Iterator[Driver]:
    carrier, said = engine(deliver, set(SITES)), list[str]()
    with engine_jobs(carrier, said.append) as jobs:
        limits = HubRounds(**{"rejoin_timeout": 0.1, **rounds})
        clients = EngineClients(carrier, jobs, RUN, {}, SITES, limits, quorum, tmp_path, said.append)
        yield Driver(clients, carrier, said)


LEARNED = [b"learned from plan 0", b"learned from plan 1", b"learned from plan 2"]


def updates(answers: list[Answer]) -> list[bytes]:
    return [answer.update for answer in answers]
