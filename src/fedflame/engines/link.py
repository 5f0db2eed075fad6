"""The connection of the engine's process on the hub to the driver. Needs only the standard library."""

from __future__ import annotations

import queue
import socket
import threading
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from fedflame.errors import InvalidMessage
from fedflame.wire.envelope import Bytes, receive, send

Request = tuple[str, str, Bytes]
"""Ticket, site, and the bytes of the envelope."""


class HubLink:
    """A connection to the driver. Several threads may send answers."""

    def __init__(self, path: Path, job_key: str) -> None:
        """Connect to the driver and send the job's key.

        Args:
            path: the driver's socket.
            job_key: the random key that the driver gave this job when it submitted it.

        Raises:
            OSError: no driver listens there.
        """
        self._connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._connection.connect(str(path))
        except OSError:
            self._connection.close()
            raise
        self._sending = threading.Lock()
        self._longest: dict[str, int] = {}
        """Ticket -> most bytes of the answer, as the driver says."""
        self._send({"kind": "hello", "job_key": job_key})

    def next_request(self) -> Request | None:
        """Wait for the next request to carry; None at the end of the job."""
        try:
            message = receive(self._connection)
            if message.text("kind") != "carry":
                return None
            ticket, site = message.text("ticket"), message.text("site")
            self._longest[ticket] = message.integer("longest_answer")
        except (EOFError, OSError, InvalidMessage):
            return None
        return ticket, site, message.body

    def requests(self) -> queue.Queue[Request | None]:
        """Return a queue that a thread fills from `next_request`; None marks the end of the job."""
        found: queue.Queue[Request | None] = queue.Queue()

        def read() -> None:
            while (request := self.next_request()) is not None:
                found.put(request)
            found.put(None)

        threading.Thread(target=read, daemon=True).start()
        return found

    def answered(self, ticket: str, site: str, *answer: Bytes) -> None:
        """Send a site's answer, which may come in pieces, to the driver; of one that is too long the size."""
        size, longest = sum(map(len, answer)), self._longest.get(ticket, 0)
        if size <= longest:
            self._send({"kind": "answered", "ticket": ticket, "site": site}, *answer)
        else:
            reason = f"{size:,} bytes; an answer to this request has at most {longest:,}"
            self._send({"kind": "oversized", "ticket": ticket, "site": site, "reason": reason})

    def failed(self, ticket: str, site: str, reason: str) -> None:
        """Tell the driver that this site will not answer, and why."""
        self._send({"kind": "failed", "ticket": ticket, "site": site, "reason": reason})

    def sites(self, names: Iterable[str]) -> None:
        """Tell the driver which sites this job reaches."""
        self._send({"kind": "sites", "sites": sorted(names)})

    def close(self) -> None:
        """Close the connection; `next_request` then returns None."""
        with suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()

    def _send(self, header: Mapping[str, Any], *body: Bytes) -> None:
        with self._sending:
            send(self._connection, header, *body)
