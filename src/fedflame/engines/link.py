"""The engine's end of the hub's socket, for its process on the hub. Needs the standard library alone."""

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
"""Ticket, site and the envelope's bytes."""


class HubLink:
    """A connection to the driver; answers may be sent from several threads."""

    def __init__(self, path: Path, job_key: str) -> None:
        """Connect and say which job this is.

        Args:
            path: the driver's socket.
            job_key: what the driver drew for this job when it submitted it.

        Raises:
            OSError: no driver is there.
        """
        self._connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._connection.connect(str(path))
        self._sending = threading.Lock()
        self._send({"kind": "hello", "job_key": job_key})

    def next_request(self) -> Request | None:
        """The next request to carry; None at the end of the job."""
        try:
            message = receive(self._connection)
        except (EOFError, OSError, InvalidMessage):
            return None
        if message.header.get("kind") != "carry":
            return None
        return message.text("ticket"), message.text("site"), message.body

    def requests(self) -> queue.Queue[Request | None]:
        """All that `next_request` gives, None included, as it comes: a thread reads it."""
        found: queue.Queue[Request | None] = queue.Queue()

        def read() -> None:
            while (request := self.next_request()) is not None:
                found.put(request)
            found.put(None)

        threading.Thread(target=read, daemon=True).start()
        return found

    def answered(self, ticket: str, site: str, *answer: Bytes) -> None:
        """Bring a site's answer, which may come in pieces, to the driver."""
        self._send({"kind": "answered", "ticket": ticket, "site": site}, *answer)

    def failed(self, ticket: str, site: str, reason: str) -> None:
        """Tell the driver that there will be none."""
        self._send({"kind": "failed", "ticket": ticket, "site": site, "reason": reason})

    def sites(self, names: Iterable[str]) -> None:
        """Tell the driver which sites this job reaches."""
        self._send({"kind": "sites", "sites": sorted(names)})

    def close(self) -> None:
        """End the connection; `next_request` returns None."""
        with suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()

    def _send(self, header: Mapping[str, Any], *body: Bytes) -> None:
        with self._sending:
            send(self._connection, header, *body)
