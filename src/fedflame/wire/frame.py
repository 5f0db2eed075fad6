"""The seal before a message: a magic number, the format version, and a checksum of the body.

The checksum detects damage, not forgery. The engine's certificates decide who may send.
"""

from __future__ import annotations

import hashlib
import struct

from fedflame.errors import InvalidMessage
from fedflame.wire.envelope import Bytes

FORMAT_VERSION = 4
_MAGIC = b"fedflame"
_HEAD = struct.Struct("<8sQ32s")
"""Magic, version, BLAKE2b-256 of the body."""
HEAD_BYTES = _HEAD.size
_DIGEST_SIZE = 32


def seal(body: bytes, version: int = FORMAT_VERSION) -> bytes:
    """Return the seal followed by the body. Files that are sealed have versions of their own."""
    return _HEAD.pack(_MAGIC, version, _digest(body)) + body


def unseal(message: Bytes, version: int = FORMAT_VERSION, kind: str = "message") -> memoryview:
    """Check a sealed message, or another sealed `kind`, and return its body, as a view.

    Raises:
        InvalidMessage: this is nothing that fedflame sealed, has another version, or is damaged.
    """
    if len(message) < _HEAD.size or message[: len(_MAGIC)] != _MAGIC:
        raise InvalidMessage(f"{len(message)} bytes that are no fedflame {kind}")
    _, stated, digest = _HEAD.unpack_from(message)
    if stated != version:
        raise InvalidMessage(f"{kind} of version {stated}; this fedflame reads version {version}")
    body = opened(message)
    if _digest(body) != digest:
        raise InvalidMessage("its checksum is wrong: truncated or damaged on the way")
    return body


def opened(message: Bytes) -> memoryview:
    """Return the body without checks, for messages that this process has sealed or unsealed before."""
    return memoryview(message)[_HEAD.size :]


def seal_digest(message: Bytes) -> str:
    """Return the body's checksum as the seal states it, in hexadecimal."""
    return message[_HEAD.size - _DIGEST_SIZE : _HEAD.size].hex()


def _digest(body: Bytes) -> bytes:
    return hashlib.blake2b(body, digest_size=_DIGEST_SIZE).digest()
