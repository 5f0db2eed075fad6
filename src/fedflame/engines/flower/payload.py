"""The content of Flower's messages: an envelope, or the name of a node.

An envelope is one array of bytes, because Flower sends each array in a request of its own. The array holds
exactly the bytes of the envelope, so that only the driver's strict reader parses what a node sends.
"""

from __future__ import annotations

from collections.abc import Iterable

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from fedflame.wire.envelope import Bytes

_RECORD, _ARRAY, _NAME = "fedflame", "envelope", "site"
_KIND = "fedflame.envelope"


def to_content(pieces: Iterable[Bytes]) -> RecordDict:
    """Join the pieces of an envelope into the content of a message."""
    envelope = b"".join(pieces)
    array = Array(dtype="uint8", shape=(len(envelope),), stype=_KIND, data=envelope)
    return RecordDict({_RECORD: ArrayRecord({_ARRAY: array})})


def from_content(content: RecordDict) -> bytes:
    """Return the bytes of the envelope; empty if the message has none."""
    record = content.array_records.get(_RECORD)
    array = record.get(_ARRAY) if record is not None else None
    return array.data if array is not None and array.stype == _KIND else b""


def to_name(name: str) -> RecordDict:
    """Return the content of a message with a node's name."""
    return RecordDict({_RECORD: ConfigRecord({_NAME: name})})


def from_name(content: RecordDict) -> str:
    """Return the node's name; empty if the message has none."""
    record = content.config_records.get(_RECORD)
    return str(record.get(_NAME, "")) if record is not None else ""
