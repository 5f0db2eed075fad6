"""Send a request from an engine's process to the trainer on this machine. It needs no torch."""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedflame.errors import InvalidMessage
from fedflame.wire.envelope import Bytes, Envelope, header_of, receive, send_pieces

SOCKET_VARIABLE = "FEDFLAME_TRAINER"
"""Environment variable at the site with the path of the trainer's socket. Only the site knows this path."""
PATIENCE_SECONDS = 60.0
"""Seconds that an engine waits for a trainer that is away; systemd restarts it in about ten."""
CONNECT_SECONDS = 10.0
RETRY_SECONDS = 0.5


def ask(path: Path, request: Envelope, patience: float, timeout: float | None = None) -> Envelope:
    """Send a request to the trainer and return its answer.

    If the trainer ends while it works, it is asked again once it is back. It does not train again for an
    answer that it has already computed.

    Args:
        path: the trainer's socket.
        request: the request.
        patience: seconds for which the trainer may be away.
        timeout: seconds that an answer may take; None for no limit.

    Raises:
        OSError: the trainer was away for longer than `patience`, or did not answer within `timeout`.
        InvalidMessage: the answer is no envelope.
    """
    return _ask(path, request.pieces(), patience, timeout)


def answer_pieces(path: Path, request: Sequence[Bytes], patience: float) -> tuple[Bytes, ...]:
    """Ask as `ask` does, with a request in pieces. An error becomes an answer of kind "failed"."""
    try:
        header = header_of(request)
    except InvalidMessage as error:
        return _failed({}, f"the request: {error}")
    try:
        return _ask(path, request, patience, None).pieces()
    except (OSError, InvalidMessage) as error:
        return _failed(header, str(error))


def _ask(path: Path, request: Sequence[Bytes], patience: float, timeout: float | None) -> Envelope:
    away_since: float | None = None
    while True:
        try:
            with _connected(path) as connection:
                away_since = None
                connection.settimeout(timeout)
                send_pieces(connection, request)
                return receive(connection)
        except TimeoutError:
            raise
        except (OSError, EOFError) as error:
            now = time.monotonic()
            away_since = now if away_since is None else away_since
            if now - away_since >= patience:
                since = f" for {patience:.0f} s" if patience else ""
                raise OSError(f"no trainer at {path}{since}: {error}") from error
            time.sleep(RETRY_SECONDS)


def _connected(path: Path) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(CONNECT_SECONDS)
        connection.connect(str(path))
    except OSError:
        connection.close()
        raise
    return connection


def _failed(request: Mapping[str, Any], reason: str) -> tuple[Bytes, ...]:
    echoed: dict[str, Any] = {name: request[name] for name in ("ticket", "run", "site") if name in request}
    return Envelope({"kind": "failed", "reason": reason, **echoed}).pieces()
