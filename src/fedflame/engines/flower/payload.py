"""What travels in Flower's messages: an envelope, or the name that a node gives itself.

An envelope is one array of bytes, since Flower sends every array by a request of its own. Its bytes are those
of the envelope and nothing more: what a node sends is parsed by nobody before the driver's strict reader.
"""

from __future__ import annotations

from collections.abc import Iterable

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from fedflame.wire.envelope import Bytes

_RECORD, _ARRAY, _NAME = "fedflame", "envelope", "site"
_KIND = "fedflame.envelope"


def to_content(pieces: Iterable[Bytes]) -> RecordDict:
    """The envelope that these pieces make."""
    envelope = b"".join(pieces)
    array = Array(dtype="uint8", shape=(len(envelope),), stype=_KIND, data=envelope)
    return RecordDict({_RECORD: ArrayRecord({_ARRAY: array})})


def from_content(content: RecordDict) -> bytes:
    """The envelope's bytes; none where there is no such array."""
    record = content.array_records.get(_RECORD)
    array = record.get(_ARRAY) if record is not None else None
    return array.data if array is not None and array.stype == _KIND else b""


def to_name(name: str) -> RecordDict:
    """The inverse of `from_name`."""
    return RecordDict({_RECORD: ConfigRecord({_NAME: name})})


def from_name(content: RecordDict) -> str:
    """The node's name; empty where it gives none."""
    record = content.config_records.get(_RECORD)
    return str(record.get(_NAME, "")) if record is not None else ""
