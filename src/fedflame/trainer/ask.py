"""Ask the trainer of this machine, from whichever engine process runs here; no torch, no engine's code."""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedflame.errors import InvalidMessage
from fedflame.wire.envelope import Bytes, Envelope, header_of, receive, send_pieces

SOCKET_VARIABLE = "FEDFLAME_TRAINER"
"""Environment variable of the site with the path of the trainer's socket: it is nobody else's business."""
PATIENCE_SECONDS = 60.0
"""For which an engine lets a trainer be away; its supervisor needs some ten to bring it back."""
CONNECT_SECONDS = 10.0
RETRY_SECONDS = 0.5


def ask(path: Path, request: Envelope, patience: float, timeout: float | None = None) -> Envelope:
    """The trainer's answer.

    A trainer that ends while it works is asked again once it is back: asked for what it has computed already,
    it answers without training twice.

    Args:
        path: its socket.
        request: what it is asked.
        patience: seconds for which a trainer may be away.
        timeout: seconds that an answer may take; None for any.

    Raises:
        OSError: it was away for longer, or did not answer in time.
        InvalidMessage: it answered something that is no envelope.
    """
    return _ask(path, request.pieces(), patience, timeout)


def answer_pieces(path: Path, request: Sequence[Bytes], patience: float) -> tuple[Bytes, ...]:
    """As `ask`, with the pieces that an engine carries; whatever goes wrong here is an answer, too."""
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
