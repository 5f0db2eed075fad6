"""What passes between hub, engine and trainer: a JSON object and a body, with their lengths before them.

The body is a sealed message or empty; an engine carries the whole as bytes that it need not understand.
Only the standard library is used, so that no engine process needs torch.
"""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedflame.errors import InvalidMessage

_MAGIC = b"flamelet"
_HEAD = struct.Struct("<8sQQ")
"""Magic, bytes of the JSON object, bytes of the body."""
_LONGEST_HEADER = 1 << 20
LONGEST_BODY = 8 << 30
"""Bytes; above any adapter that travels, below what a wrong length would claim."""
Bytes = bytes | memoryview
"""Bodies are large, so that most are passed on as views, and in pieces, instead of copied."""


@dataclass(frozen=True)
class Envelope:
    """A JSON object about a body."""

    header: dict[str, Any]
    body: Bytes = b""

    def text(self, name: str) -> str:
        """A field that must be a string. Raises InvalidMessage."""
        value = self.header.get(name)
        if not isinstance(value, str):
            raise InvalidMessage(f"field {name} is {value!r}; a string is needed")
        return value

    def to_bytes(self) -> bytes:
        """The inverse of `from_bytes`."""
        return b"".join(self.pieces())

    def pieces(self) -> tuple[bytes, Bytes]:
        """`to_bytes` in two: all but the body, and the body."""
        return _before_body(self.header, len(self.body)), self.body

    @classmethod
    def from_bytes(cls, content: Bytes) -> Envelope:
        """Its body is a view of `content`. Raises InvalidMessage as `header_of` does."""
        view = memoryview(content)
        header, start = _opened(view, len(view))
        return cls(header, view[start:])


def header_of(pieces: Sequence[Bytes]) -> dict[str, Any]:
    """The JSON object of an envelope in pieces, the first of which must hold all of it.

    Raises:
        InvalidMessage: no envelope, or one with a byte too few or too many.
    """
    first = memoryview(pieces[0] if pieces else b"")
    return _opened(first, sum(map(len, pieces)))[0]


def send(connection: socket.socket, header: Mapping[str, Any], *body: Bytes) -> None:
    """Send an envelope whose body comes in pieces. Raises OSError where the other side has gone."""
    send_pieces(connection, (_before_body(header, sum(map(len, body))), *body))


def send_pieces(connection: socket.socket, pieces: Sequence[Bytes]) -> None:
    """Send one after another, because to join them would copy them. Raises OSError as `send` does."""
    for piece in pieces:
        connection.sendall(piece)


def receive(connection: socket.socket, longest_body: int = LONGEST_BODY) -> Envelope:
    """The next envelope; memory is taken only as its bytes arrive.

    Raises:
        EOFError: the other side has gone, between two envelopes or within one.
        InvalidMessage: something else than an envelope, or a longer one.
        OSError: the connection is broken, or its timeout has passed.
    """
    header_size, body_size = _sizes(_exactly(connection, _HEAD.size))
    if body_size > longest_body:
        raise InvalidMessage(
            f"envelope with a body of {body_size:,} bytes; at most {longest_body:,} are read"
        )
    header = _object(_exactly(connection, header_size))
    return Envelope(header, _exactly(connection, body_size))


def _before_body(header: Mapping[str, Any], body_size: int) -> bytes:
    text = json.dumps(header).encode()
    return _HEAD.pack(_MAGIC, len(text), body_size) + text


def _opened(first: memoryview, size: int) -> tuple[dict[str, Any], int]:
    """The header of an envelope of `size` bytes that begins with `first`, and where its body begins."""
    header_size, body_size = _sizes(first[: _HEAD.size])
    start = _HEAD.size + header_size
    if size != start + body_size:
        raise InvalidMessage(f"envelope of {size} bytes that says {start + body_size}")
    if len(first) < start:
        raise InvalidMessage("an envelope whose first piece ends within its header")
    return _object(bytes(first[_HEAD.size : start])), start


def _sizes(head: Bytes) -> tuple[int, int]:
    if len(head) != _HEAD.size:
        raise InvalidMessage(f"{len(head)} bytes that are no envelope")
    magic, header_size, body_size = _HEAD.unpack(head)
    if magic != _MAGIC or header_size > _LONGEST_HEADER:
        raise InvalidMessage("bytes that are no envelope")
    return header_size, body_size


def _object(text: bytes) -> dict[str, Any]:
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidMessage(f"envelope whose header is no JSON: {error}") from error
    if not isinstance(header, dict):
        raise InvalidMessage("envelope whose header is no JSON object")
    return header


def _exactly(connection: socket.socket, size: int) -> bytes:
    # With a buffer of one byte the reader takes nothing beyond, and fills one block without a copy between;
    # the system gives that block memory only where bytes arrive.
    with connection.makefile("rb", buffering=1) as reader:
        received = reader.read(size)
    if len(received) < size:
        raise EOFError(f"the connection ended after {len(received)} of {size} bytes")
    return received
