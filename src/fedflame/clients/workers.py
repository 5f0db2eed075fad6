"""Clients in several processes on this machine; their updates have the same bytes as in one process.

This process is the first worker: it trains with the base that it holds anyway. Between its optimizer steps it
listens to the other workers and gives them plans, so it needs no thread. Each of the others holds the base
once and trains one client after another. It ends when its connection closes, so none is left when this
process is killed.
"""

from __future__ import annotations

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
from fedflame.base.device import DeviceChoice
from fedflame.clients.answers import Answer, OnStep
from fedflame.clients.fork_server import leave_signals_to_main, process_context
from fedflame.clients.local import LocalClients
from fedflame.config.sections import AdapterConfig
from fedflame.config.words import Checkpointed, Dtype
from fedflame.data.encoding import EncodedRow
from fedflame.errors import UserError
from fedflame.messages import ClientUpdate
from fedflame.training.error_feedback import Residuals
from fedflame.training.evaluation import HeldOut

STOP_SECONDS = 10.0


@dataclass(frozen=True)
class WorkerSetup:
    """What a worker needs to build its `LocalClients`. The same number of threads gives the same bytes."""

    model_name_or_path: str
    dtype: Dtype
    adapter: AdapterConfig
    gradient_checkpointing: Checkpointed
    device: str
    rows: Sequence[Sequence[EncodedRow]]
    pad_token_id: int
    residuals: Residuals
    threads: int
    tests: Sequence[HeldOut] = ()


def worker_devices(device: DeviceChoice, count: int) -> list[str]:
    """Return the device of each worker, this process first: the cards in turn, or the CPU for all."""
    places = [card.name for card in device.cards] or [device.name]
    return [places[number % len(places)] for number in range(count)]


@dataclass(eq=False)
class _Asked:
    """A plan that was given to a worker, and its answer as soon as there is one."""

    answer: Answer | None = None


class _Stream:
    """The plans of one call, taken one after another, and the answers in their order."""

    def __init__(self, plans: Iterable[tuple[int, bytes]], limit: int) -> None:
        self._coming, self._limit = iter(plans), limit
        self._asked: deque[_Asked] = deque()

    def take(self) -> tuple[_Asked, bytes] | None:
        """Take the next plan; None if there is none, or if `limit` answers are still to be handed on."""
        coming = next(self._coming, None) if len(self._asked) < self._limit else None
        if coming is None:
            return None
        self._asked.append(_Asked())
        return self._asked[-1], coming[1]

    def answers(self) -> Iterator[Answer]:
        """Hand on the answers that are there, up to the first that is missing."""
        while self._asked and (answer := self._asked[0].answer) is not None:
            self._asked.popleft()
            yield answer

    @property
    def is_open(self) -> bool:
        """Whether an answer is still to be handed on."""
        return bool(self._asked)


@dataclass(eq=False)
class _Worker:
    """Another process, which at first loads the base, and then rests or trains."""

    process: BaseProcess
    connection: Connection
    ready: bool = False
    """Whether it has loaded the base."""
    asked: _Asked | None = None
    """The plan that it works on."""
    start: float = field(default_factory=time.monotonic)


class WorkerClients:
    """Trains clients in this process and in others. As a context manager it starts and ends the others."""

    def __init__(self, own: LocalClients, setups: Sequence[WorkerSetup]) -> None:
        """Start nothing yet.

        Args:
            own: the clients in this process.
            setups: what each other process needs for the same clients.
        """
        self._own, self._setups = own, setups
        self._workers: dict[int, _Worker] = {}

    def __enter__(self) -> Self:
        self._start_missing()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop(list(self._workers))

    def train(self, plans: Iterable[tuple[int, bytes]], on_step: OnStep) -> Iterator[Answer]:
        return self._answers(plans, on_step)

    def evaluate(self, plans: Iterable[tuple[int, bytes]]) -> Iterator[Answer]:
        return self._answers(plans, lambda tokens: None)

    def _answers(self, plans: Iterable[tuple[int, bytes]], on_step: OnStep) -> Iterator[Answer]:
        # Twice the workers: no worker waits for an earlier, slow client, and memory stays bounded.
        stream = _Stream(plans, 2 * (1 + len(self._setups)))

        def between_steps(tokens: int) -> None:
            on_step(tokens)
            self._listen(on_step, timeout=0)
            self._give(stream)

        self._start_missing()
        self._listen(on_step, timeout=0)  # who has ended since the last round gets no plan
        try:
            while True:
                taken = stream.take()
                self._give(stream)
                if taken is not None:
                    asked, plan = taken
                    asked.answer = self._own.answer(plan, between_steps)
                elif stream.is_open:
                    self._listen(on_step, timeout=None)
                else:
                    return
                yield from stream.answers()
        finally:  # only if the caller left the stream before its end is a worker at work
            self._stop([number for number, worker in self._workers.items() if worker.asked])

    def believed_rows(self, client: int) -> int:
        return self._own.believed_rows(client)

    def believed(self, update: ClientUpdate) -> ClientUpdate:
        return self._own.believed(update)

    def num_examples(self) -> list[int]:
        return self._own.num_examples()

    def test_rows(self) -> list[int | None]:
        return self._own.test_rows()

    def name(self, client: int) -> str:
        return self._own.name(client)

    def _give(self, stream: _Stream) -> None:
        """Give a plan to every worker that rests, as long as there are plans to take."""
        for worker in self._workers.values():
            if worker.ready and worker.asked is None and (taken := stream.take()):
                worker.asked, plan = taken
                worker.start = time.monotonic()
                with suppress(OSError):  # the worker has ended; `_listen` finds out
                    worker.connection.send_bytes(plan)

    def _listen(self, on_step: OnStep, timeout: float | None) -> None:
        """Hear all that the workers have sent; wait so many seconds for the first message, None: for ever."""
        while ready := wait([worker.connection for worker in self._workers.values()], timeout):
            for number, worker in list(self._workers.items()):
                if worker.connection in ready:
                    self._hear(number, worker, on_step)
            timeout = 0

    def _hear(self, number: int, worker: _Worker, on_step: OnStep) -> None:
        try:
            news = worker.connection.recv()
        except (EOFError, OSError):
            self._replace(number, worker)
            return
        if isinstance(news, UserError):
            raise news
        if isinstance(news, int):
            on_step(news)
        elif isinstance(news, Answer):
            assert worker.asked is not None, "an answer follows a plan"
            worker.asked.answer, worker.asked = news, None
        else:
            worker.ready = True

    def _replace(self, number: int, worker: _Worker) -> None:
        """Start another process for a worker that has ended; its client has failed."""
        worker.process.join(STOP_SECONDS)
        ended = f"worker process ended with exit code {worker.process.exitcode}"
        if worker.asked is not None:
            worker.asked.answer = Answer(b"", f"its {ended}", time.monotonic() - worker.start)
        elif not worker.ready:  # another process would end like this one
            raise UserError(f"a {ended} while it loaded the model; fewer workers take less memory")
        del self._workers[number]
        self._start_missing()

    def _start_missing(self) -> None:
        for number, setup in enumerate(self._setups):
            if number not in self._workers:
                self._workers[number] = _start(setup)

    def _stop(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            worker = self._workers.pop(number)
            worker.connection.close()
            worker.process.kill()
            worker.process.join(STOP_SECONDS)


def _start(setup: WorkerSetup) -> _Worker:
    context = process_context()
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, setup), daemon=True)
    process.start()
    theirs.close()  # otherwise the connection would stay open when the worker ends
    return _Worker(process, ours)


def _serve(connection: Connection, setup: WorkerSetup) -> None:
    """Run a worker: load the base, say so with None, and answer plans until the connection ends."""
    leave_signals_to_main()
    torch.set_num_threads(setup.threads)
    logging.disable_progress_bar()
    with suppress(EOFError, OSError):
        try:
            clients = _load(setup)
            connection.send(None)
            while True:
                connection.send(clients.answer(connection.recv_bytes(), connection.send))
        except UserError as error:
            connection.send(error)


def _load(setup: WorkerSetup) -> LocalClients:
    adapted, _ = load_adapted_model(
        setup.model_name_or_path, setup.dtype, setup.adapter, setup.gradient_checkpointing, setup.device
    )
    return LocalClients(adapted, setup.rows, setup.pad_token_id, setup.residuals, tests=setup.tests)
