"""Run the jobs of an engine, one after another, and talk to the current job over a socket."""

from __future__ import annotations

import queue
import secrets
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedflame.engines.engine import Engine
from fedflame.errors import InvalidMessage
from fedflame.trainer.unix_socket import listening, same_user
from fedflame.wire.envelope import Bytes, Envelope, receive, send

POLL_SECONDS = 1.0
HELLO_SECONDS = 10.0
"""In which whoever connects has to say which job it is."""


class EngineJobEnded(Exception):
    """The job or its connection has ended. The message is the reason."""


@dataclass
class EngineJob:
    """A running job."""

    id: str
    """The engine's id of the job."""
    key: str
    """The random key that its first message must contain."""
    connection: socket.socket
    sites: set[str] = field(default_factory=set)
    """The sites that it reaches, as it last reported."""
    longest_answers: dict[str, int] = field(default_factory=dict)
    """Ticket -> most bytes of the answer."""

    def longest_body(self, header: Mapping[str, Any]) -> int:
        """Return the most bytes that a message with this header may bring."""
        ticket = header.get("ticket")
        return self.longest_answers.get(ticket, 0) if isinstance(ticket, str) else 0


class EngineJobs:
    """Starts jobs, one at a time, and talks to them over the driver's socket."""

    def __init__(
        self, engine: Engine, listener: socket.socket, path: Path, say: Callable[[str], None]
    ) -> None:
        self._engine, self._path, self._say = engine, path, say
        self._expected = ""
        self._hellos: queue.Queue[tuple[str, socket.socket]] = queue.Queue()
        self._events: queue.Queue[tuple[str, Envelope | None]] = queue.Queue()
        self._job: EngineJob | None = None
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    @property
    def current(self) -> EngineJob | None:
        """The job that runs; None if there is none."""
        return self._job

    def start(self, timeout: float) -> EngineJob:
        """Submit a job, when none runs, and wait for its first message.

        Raises:
            EngineJobEnded: the engine refused the job, or the job ended or sent nothing within `timeout`
                seconds.
        """
        key = self._expected = secrets.token_hex(8)
        try:
            job = self._engine.submit(self._path, key)
        except OSError as error:
            raise EngineJobEnded(f"the engine did not take the job: {error}") from error
        try:
            connection = self._first_word(key, job, time.monotonic() + timeout)
        except EngineJobEnded:
            self._engine.stop(job)
            raise
        self._job = EngineJob(job, key, connection)
        threading.Thread(target=self._read, args=(self._job,), daemon=True).start()
        self._say(f"job {job} is there")
        return self._job

    def stop(self) -> None:
        """End the current job, if there is one."""
        if self._job is not None:
            job, self._job = self._job, None
            _close(job.connection)
            self._engine.stop(job.id)

    def carry(self, ticket: str, site: str, longest_answer: int, *request: Bytes) -> None:
        """Send a request, which may come in pieces, to the job; its answer may have so many bytes.

        Raises:
            EngineJobEnded: the job is over.
        """
        assert self._job is not None
        self._job.longest_answers[ticket] = longest_answer
        header = {"kind": "carry", "ticket": ticket, "site": site, "longest_answer": longest_answer}
        try:
            send(self._job.connection, header, *request)
        except OSError as error:
            raise self._ended() from error

    def event(self, timeout: float) -> Envelope | None:
        """Return the job's next message, or None after `timeout` seconds. Raises EngineJobEnded."""
        assert self._job is not None
        try:
            key, envelope = self._events.get(timeout=timeout)
        except queue.Empty:
            if (how := self._engine.ended(self._job.id)) is not None:
                raise self._ended(how) from None
            return None
        if key != self._job.key:  # from an earlier job
            return None
        if envelope is None:
            raise self._ended()
        return envelope

    def _ended(self, how: str | None = None) -> EngineJobEnded:
        job, self._job = self._job, None
        assert job is not None
        _close(job.connection)
        if how is None:
            how = self._engine.ended(job.id) or "its connection ended"
        self._engine.stop(job.id)
        return EngineJobEnded(f"job {job.id} is over: {how}")

    def _first_word(self, key: str, job: str, deadline: float) -> socket.socket:
        while time.monotonic() < deadline:
            try:
                said, connection = self._hellos.get(timeout=POLL_SECONDS)
            except queue.Empty:
                if (how := self._engine.ended(job)) is not None:
                    raise EngineJobEnded(f"job {job} is over before its first word: {how}") from None
                continue
            if said == key:
                return connection
            _close(connection)
        raise EngineJobEnded(f"job {job} did not say a word in time")

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=self._greet, args=(connection,), daemon=True).start()

    def _greet(self, connection: socket.socket) -> None:
        """Accept the connection only if it comes from this user and sends the expected job key."""
        try:
            connection.settimeout(HELLO_SECONDS)
            hello = receive(connection, longest_body=0)
            connection.settimeout(None)
            key = hello.text("job_key")
        except (EOFError, OSError, InvalidMessage):
            _close(connection)
            return
        if not same_user(connection) or key != self._expected:
            self._say("refused: a job that is not the one that was submitted last")
            _close(connection)
            return
        self._hellos.put((key, connection))

    def _read(self, job: EngineJob) -> None:
        while True:
            try:
                self._events.put((job.key, receive(job.connection, job.longest_body)))
            except (EOFError, OSError, InvalidMessage):
                self._events.put((job.key, None))
                return


@contextmanager
def engine_jobs(engine: Engine, say: Callable[[str], None]) -> Iterator[EngineJobs]:
    """Open the driver's socket in a temporary folder. At the end, stop the current job."""
    with tempfile.TemporaryDirectory(prefix="fedflame-") as folder:
        path = Path(folder) / "hub.sock"
        with listening(path) as listener:
            found = EngineJobs(engine, listener, path, say)
            try:
                yield found
            finally:
                found.stop()


def _close(connection: socket.socket) -> None:
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()
