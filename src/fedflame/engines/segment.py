"""A segment: one job of the engine, from its submission to the end of its connection."""

from __future__ import annotations

import queue
import secrets
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from fedflame.engines.engine import Engine
from fedflame.errors import InvalidMessage
from fedflame.wire.envelope import Bytes, Envelope, receive, send
from fedflame.wire.unix_socket import listening, same_user

POLL_SECONDS = 1.0


class SegmentEnded(Exception):
    """The job is over or its connection is; the message is the reason."""


@dataclass
class Segment:
    """A running job."""

    job: str
    name: str
    connection: socket.socket
    sites: set[str] = field(default_factory=set)
    """Those that it reaches, as it said last."""


class Segments:
    """The driver's socket, and one segment after another that connects to it."""

    def __init__(
        self, engine: Engine, listener: socket.socket, path: Path, say: Callable[[str], None]
    ) -> None:
        self._engine, self._path, self._say = engine, path, say
        self._expected = ""
        self._hellos: queue.Queue[tuple[str, socket.socket]] = queue.Queue()
        self._events: queue.Queue[tuple[str, Envelope | None]] = queue.Queue()
        self._segment: Segment | None = None
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    @property
    def current(self) -> Segment | None:
        """The one that runs."""
        return self._segment

    def start(self, timeout: float) -> Segment:
        """Submit a job and wait for its first word.

        Raises:
            SegmentEnded: the engine did not take it, or it ended or said nothing within `timeout` seconds.
        """
        self.stop()
        name = self._expected = secrets.token_hex(8)
        try:
            job = self._engine.submit(self._path, name)
        except OSError as error:
            raise SegmentEnded(f"the engine did not take the job: {error}") from error
        try:
            connection = self._first_word(name, job, time.monotonic() + timeout)
        except SegmentEnded:
            self._engine.stop(job)
            raise
        self._segment = Segment(job, name, connection)
        threading.Thread(target=self._read, args=(name, connection), daemon=True).start()
        self._say(f"job {job} is there")
        return self._segment

    def stop(self) -> None:
        """End the segment that runs, if any."""
        if self._segment is not None:
            segment, self._segment = self._segment, None
            _close(segment.connection)
            self._engine.stop(segment.job)

    def carry(self, ticket: str, site: str, *request: Bytes) -> None:
        """Hand a request, which may come in pieces, to the job. Raises SegmentEnded."""
        assert self._segment is not None
        header = {"kind": "carry", "ticket": ticket, "site": site}
        try:
            send(self._segment.connection, header, *request)
        except OSError as error:
            raise self._ended() from error

    def event(self, timeout: float) -> Envelope | None:
        """The job's next word; None if there is none within `timeout` seconds. Raises SegmentEnded."""
        assert self._segment is not None
        try:
            name, envelope = self._events.get(timeout=max(0.0, timeout))
        except queue.Empty:
            if (how := self._engine.ended(self._segment.job)) is not None:
                raise self._ended(how) from None
            return None
        if name != self._segment.name:  # of an earlier segment
            return None
        if envelope is None:
            raise self._ended()
        return envelope

    def _ended(self, how: str | None = None) -> SegmentEnded:
        segment, self._segment = self._segment, None
        assert segment is not None
        _close(segment.connection)
        if how is None:
            how = self._engine.ended(segment.job) or "its connection ended"
        self._engine.stop(segment.job)
        return SegmentEnded(f"job {segment.job} is over: {how}")

    def _first_word(self, name: str, job: str, deadline: float) -> socket.socket:
        while time.monotonic() < deadline:
            try:
                segment, connection = self._hellos.get(timeout=POLL_SECONDS)
            except queue.Empty:
                if (how := self._engine.ended(job)) is not None:
                    raise SegmentEnded(f"job {job} is over before its first word: {how}") from None
                continue
            if segment == name:
                return connection
            _close(connection)
        raise SegmentEnded(f"job {job} did not say a word in time")

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=self._greet, args=(connection,), daemon=True).start()

    def _greet(self, connection: socket.socket) -> None:
        """Let the expected segment in, and nobody else."""
        try:
            connection.settimeout(10)
            hello = receive(connection, longest_body=0)
            connection.settimeout(None)
            segment = hello.text("segment")
        except (EOFError, OSError, InvalidMessage):
            _close(connection)
            return
        if not same_user(connection) or segment != self._expected:
            self._say("refused: a job that is not the one that was submitted last")
            _close(connection)
            return
        self._hellos.put((segment, connection))

    def _read(self, name: str, connection: socket.socket) -> None:
        while True:
            try:
                self._events.put((name, receive(connection)))
            except (EOFError, OSError, InvalidMessage):
                self._events.put((name, None))
                return


@contextmanager
def segments(engine: Engine, say: Callable[[str], None]) -> Iterator[Segments]:
    """A socket in a folder of its own, which goes with the last segment."""
    with tempfile.TemporaryDirectory(prefix="fedflame-") as folder:
        path = Path(folder) / "hub.sock"
        with listening(path) as listener:
            found = Segments(engine, listener, path, say)
            try:
                yield found
            finally:
                found.stop()


def _close(connection: socket.socket) -> None:
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()
