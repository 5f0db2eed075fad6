"""The seal around a message: what it is, which version, and a checksum over all that follows.

It finds damage, not forgery: who may send is the engine's business (certificates).
"""

from __future__ import annotations

import hashlib
import struct

from fedflame.errors import InvalidMessage
from fedflame.wire.envelope import Bytes

FORMAT_VERSION = 3
_MAGIC = b"fedflame"
_HEAD = struct.Struct("<8sQ32s")
"""Magic, version and BLAKE2b-256 of the body."""
_DIGEST_SIZE = 32


def seal(body: bytes) -> bytes:
    """The body after its head."""
    return _HEAD.pack(_MAGIC, FORMAT_VERSION, _digest(body)) + body


def unseal(message: Bytes) -> memoryview:
    """The body of a sealed message, as a view of it.

    Raises:
        InvalidMessage: no message of ours, one of another version, or damaged on the way.
    """
    if len(message) < _HEAD.size or message[: len(_MAGIC)] != _MAGIC:
        raise InvalidMessage(f"{len(message)} bytes that are no fedflame message")
    _, version, digest = _HEAD.unpack_from(message)
    if version != FORMAT_VERSION:
        raise InvalidMessage(f"message of version {version}; this fedflame reads version {FORMAT_VERSION}")
    body = opened(message)
    if _digest(body) != digest:
        raise InvalidMessage("its checksum is wrong: truncated or damaged on the way")
    return body


def opened(message: Bytes) -> memoryview:
    """The body of a message that this process has sealed or unsealed before: nothing is checked again."""
    return memoryview(message)[_HEAD.size :]


def seal_digest(message: Bytes) -> str:
    """What the seal says of the body, which `unseal` holds it to."""
    return message[_HEAD.size - _DIGEST_SIZE : _HEAD.size].hex()


def _digest(body: Bytes) -> bytes:
    return hashlib.blake2b(body, digest_size=_DIGEST_SIZE).digest()
