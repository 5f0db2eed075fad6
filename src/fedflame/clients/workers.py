"""Clients in worker processes on this machine; their updates have the same bytes as in one process.

Each worker holds the model once and trains one client after another. A worker ends when its connection
closes, so none is left when this process is killed.
"""

from __future__ import annotations

import signal
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Self

import torch
from transformers.utils import logging

from fedflame.base.adapted import load_adapted_model
from fedflame.clients.answers import Answer, OnStep
from fedflame.clients.fork_server import process_context
from fedflame.clients.local import LocalClients
from fedflame.config.sections import AdapterConfig
from fedflame.config.words import Checkpointed, Dtype
from fedflame.data.encoding import EncodedRow
from fedflame.training.error_feedback import Residuals

STOP_SECONDS = 10.0


@dataclass(frozen=True)
class WorkerSetup:
    """What a worker needs to build its `LocalClients`. The same number of threads gives the same bytes."""

    model_name_or_path: str
    dtype: Dtype
    adapter: AdapterConfig
    gradient_checkpointing: Checkpointed
    rows: Sequence[Sequence[EncodedRow]]
    pad_token_id: int
    residuals: Residuals
    threads: int


@dataclass(eq=False)
class _Worker:
    process: BaseProcess
    connection: Connection
    ticket: int = -1
    """Number of the plan that it works on."""
    start: float = field(default_factory=time.monotonic)


class WorkerClients:
    """Trains clients in at most `count` worker processes. As a context manager it starts and ends them."""

    def __init__(self, setup: WorkerSetup, count: int) -> None:
        self._setup, self._count = setup, count
        self._idle: list[_Worker] = []
        self._busy: list[_Worker] = []

    def __enter__(self) -> Self:
        self._idle = [self._start() for _ in range(self._count)]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in [*self._idle, *self._busy]:
            _stop(worker)

    def train(self, plans: Iterable[tuple[int, bytes]], on_step: OnStep) -> Iterator[Answer]:
        tickets, done, coming = 0, dict[int, Answer](), iter(plans)
        expected: deque[int] = deque()
        try:
            while True:
                # Twice the workers: no worker waits for an earlier, slow client, and memory stays bounded.
                while len(self._busy) < self._count and len(expected) < 2 * self._count:
                    asked = next(coming, None)
                    if asked is None:
                        break
                    self._give(asked[1], tickets)
                    expected.append(tickets)
                    tickets += 1
                if not expected:
                    return
                while expected[0] not in done:
                    done |= self._receive(on_step)
                yield done.pop(expected.popleft())
        finally:
            for worker in self._busy:  # only if the caller left the stream before its end
                _stop(worker)
            self._busy = []

    def num_examples(self) -> list[int]:
        return [len(rows) for rows in self._setup.rows]

    def name(self, client: int) -> str:
        return f"client {client}"

    def _give(self, plan: bytes, ticket: int) -> None:
        worker = self._idle.pop() if self._idle else self._start()
        worker.ticket, worker.start = ticket, time.monotonic()
        self._busy.append(worker)
        with suppress(OSError):  # the worker has ended; `_receive` reports it
            worker.connection.send_bytes(plan)

    def _receive(self, on_step: OnStep) -> dict[int, Answer]:
        """Wait for messages of the busy workers; return ticket -> answer."""
        answers = {}
        ready = wait([worker.connection for worker in self._busy])
        for worker in [worker for worker in self._busy if worker.connection in ready]:
            try:
                news = worker.connection.recv()
            except (EOFError, OSError):
                worker.process.join(STOP_SECONDS)
                failure = f"its worker process ended with exit code {worker.process.exitcode}"
                answers[worker.ticket] = Answer(b"", failure, time.monotonic() - worker.start)
                self._busy.remove(worker)
                continue
            if isinstance(news, Answer):
                answers[worker.ticket] = news
                self._busy.remove(worker)
                self._idle.append(worker)
            else:
                on_step(news)
        return answers

    def _start(self) -> _Worker:
        context = process_context()
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, self._setup), daemon=True)
        process.start()
        theirs.close()  # otherwise the connection would stay open when the worker ends
        return _Worker(process, ours)


def _stop(worker: _Worker) -> None:
    worker.connection.close()
    worker.process.terminate()
    worker.process.join(STOP_SECONDS)


def _serve(connection: Connection, setup: WorkerSetup) -> None:
    """Run a worker: answer plans until the connection ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the main process decides
    torch.set_num_threads(setup.threads)
    logging.disable_progress_bar()
    adapted, _ = load_adapted_model(
        setup.model_name_or_path, setup.dtype, setup.adapter, setup.gradient_checkpointing
    )
    clients = LocalClients(adapted, setup.rows, setup.pad_token_id, setup.residuals)
    while True:
        try:
            connection.send(clients.answer(connection.recv_bytes(), connection.send))
        except (EOFError, OSError):
            return
