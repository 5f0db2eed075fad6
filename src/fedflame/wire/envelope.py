"""The envelope between hub, engine and trainer: both lengths, a JSON header, and a body.

The body is a sealed message or empty. An engine carries an envelope as bytes and need not understand it. This
file uses only the standard library, so that no engine process needs torch.
"""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedflame.errors import InvalidMessage
from fedflame.wire.header import read_header

_MAGIC = b"flamelet"
_HEAD = struct.Struct("<8sQQ")
"""Magic, length of the header in bytes, length of the body in bytes."""
_LONGEST_HEADER = 1 << 20
LONGEST_BEFORE_BODY = _HEAD.size + _LONGEST_HEADER
"""In bytes: the most of an envelope that is not its body."""
LONGEST_BODY = 8 << 30
"""In bytes: larger than any message, smaller than most lengths that random bytes would claim."""
Bytes = bytes | memoryview
"""Bodies are large, so they are passed as views, and in pieces, instead of being copied."""


@dataclass(frozen=True)
class Envelope:
    """A JSON header and a body."""

    header: dict[str, Any]
    body: Bytes = b""

    def text(self, name: str) -> str:
        """Return a field of the header. Raises InvalidMessage if it is not a string."""
        value = self.header.get(name)
        if not isinstance(value, str):
            raise InvalidMessage(f"field {name} is {value!r}; a string is needed")
        return value

    def integer(self, name: str) -> int:
        """Return a field of the header. Raises InvalidMessage if it is not an integer."""
        value = self.header.get(name)
        if type(value) is not int:
            raise InvalidMessage(f"field {name} is {value!r}; an integer is needed")
        return value

    def truth(self, name: str) -> bool:
        """Return a field of the header. Raises InvalidMessage if it is neither true, false nor absent."""
        value = self.header.get(name, False)
        if type(value) is not bool:
            raise InvalidMessage(f"field {name} is {value!r}; true or false is needed")
        return value

    def to_bytes(self) -> bytes:
        """The inverse of `from_bytes`."""
        return b"".join(self.pieces())

    def pieces(self) -> tuple[bytes, Bytes]:
        """Return the bytes of the envelope in two pieces: all before the body, and the body."""
        return _before_body(self.header, len(self.body)), self.body

    @classmethod
    def from_bytes(cls, content: Bytes) -> Envelope:
        """Read an envelope; its body is a view of `content`. Raises InvalidMessage as `header_of` does."""
        view = memoryview(content)
        header, start = _opened(view, len(view))
        return cls(header, view[start:])


def header_of(pieces: Sequence[Bytes]) -> dict[str, Any]:
    """Return the header of an envelope that comes in pieces. The first piece must hold the whole header.

    Raises:
        InvalidMessage: this is no envelope, or its length is not the one that it states.
    """
    first = memoryview(pieces[0] if pieces else b"")
    return _opened(first, sum(map(len, pieces)))[0]


def send(connection: socket.socket, header: Mapping[str, Any], *body: Bytes) -> None:
    """Send an envelope whose body comes in pieces. Raises OSError if the other side has gone."""
    send_pieces(connection, (_before_body(header, sum(map(len, body))), *body))


def send_pieces(connection: socket.socket, pieces: Sequence[Bytes]) -> None:
    """Send pieces one after another, because joining them would copy them. Raises OSError as `send` does."""
    for piece in pieces:
        connection.sendall(piece)


def receive(
    connection: socket.socket, longest_body: int | Callable[[dict[str, Any]], int] = LONGEST_BODY
) -> Envelope:
    """Receive the next envelope. Memory is used only as its bytes arrive, whatever length it states.

    Args:
        connection: the socket.
        longest_body: the most bytes of a body that are read, or a function that tells them from the header.

    Raises:
        EOFError: the other side has closed the connection, between two envelopes or within one.
        InvalidMessage: this is no envelope, or its body is longer than `longest_body` bytes.
        OSError: the connection is broken, or its timeout has passed.
    """
    header_size, body_size = _sizes(_exactly(connection, _HEAD.size))
    header = read_header(_exactly(connection, header_size))
    longest = longest_body(header) if callable(longest_body) else longest_body
    if body_size > longest:
        raise InvalidMessage(f"envelope with a body of {body_size:,} bytes; at most {longest:,} are read")
    return Envelope(header, _exactly(connection, body_size))


def _before_body(header: Mapping[str, Any], body_size: int) -> bytes:
    text = json.dumps(header).encode()
    return _HEAD.pack(_MAGIC, len(text), body_size) + text


def _opened(first: memoryview, size: int) -> tuple[dict[str, Any], int]:
    """Return the header of an envelope of `size` bytes, from its first piece, and the body's offset."""
    header_size, body_size = _sizes(first[: _HEAD.size])
    start = _HEAD.size + header_size
    if size != start + body_size:
        raise InvalidMessage(f"envelope of {size} bytes that says {start + body_size}")
    if len(first) < start:
        raise InvalidMessage("an envelope whose first piece ends within its header")
    return read_header(bytes(first[_HEAD.size : start])), start


def _sizes(head: Bytes) -> tuple[int, int]:
    if len(head) != _HEAD.size:
        raise InvalidMessage(f"{len(head)} bytes that are no envelope")
    magic, header_size, body_size = _HEAD.unpack(head)
    if magic != _MAGIC or header_size > _LONGEST_HEADER:
        raise InvalidMessage("bytes that are no envelope")
    return header_size, body_size


def _exactly(connection: socket.socket, size: int) -> bytes:
    # With a buffer of one byte the reader reads nothing beyond `size` and fills one block without a copy.
    # The system gives this block memory only where bytes arrive.
    with connection.makefile("rb", buffering=1) as reader:
        received = reader.read(size)
    if len(received) < size:
        raise EOFError(f"the connection ended after {len(received)} of {size} bytes")
    return received
