"""Envelopes over a socket and back, and what is refused of them."""

from __future__ import annotations

import socket
import struct
import threading
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedflame.errors import InvalidMessage
from fedflame.wire.envelope import Envelope, header_of, receive, send

values = st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.text(max_size=20)
headers = st.dictionaries(st.text(max_size=8), values | st.lists(values, max_size=3), max_size=5)


@given(headers, st.binary(max_size=300))
def test_an_envelope_comes_back(header: dict[str, Any], body: bytes) -> None:
    assert Envelope.from_bytes(Envelope(header, body).to_bytes()) == Envelope(header, body)


@settings(deadline=None, max_examples=20)
@given(st.lists(st.tuples(headers, st.binary(max_size=5000)), min_size=1, max_size=4))
def test_envelopes_come_one_after_another_over_a_socket(sent: list[tuple[dict[str, Any], bytes]]) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        envelopes = [Envelope(header, body) for header, body in sent]
        writer = threading.Thread(
            target=lambda: [send(ours, header, body[:7], body[7:]) for header, body in sent]
        )
        writer.start()
        assert [receive(theirs) for _ in envelopes] == envelopes
        writer.join()
        ours.close()
        with pytest.raises(EOFError):
            receive(theirs)


@given(st.data())
def test_a_damaged_envelope_is_refused_or_another_envelope(data: st.DataObject) -> None:
    content = bytearray(Envelope({"kind": "train", "ticket": "t"}, b"body").to_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        assert isinstance(Envelope.from_bytes(bytes(content)), Envelope)
    except InvalidMessage as reason:
        assert str(reason)


@given(st.binary(max_size=200))
def test_garbage_is_refused(garbage: bytes) -> None:
    with pytest.raises(InvalidMessage):
        Envelope.from_bytes(garbage)


def test_at_every_length_a_truncated_envelope_is_refused() -> None:
    content = Envelope({"kind": "train"}, b"body").to_bytes()
    for length in range(len(content)):
        with pytest.raises(InvalidMessage):
            Envelope.from_bytes(content[:length])
    with pytest.raises(InvalidMessage, match=r"envelope of \d+ bytes that says"):
        Envelope.from_bytes(content + b"x")


@given(headers, st.binary(max_size=300), st.integers(0, 300))
def test_the_header_of_pieces_is_that_of_the_whole(header: dict[str, Any], body: bytes, cut: int) -> None:
    before, body = Envelope(header, body).pieces()
    assert header_of([before, body[:cut], body[cut:]]) == header_of([before + body]) == header
    for wrong in ([before, body, b"x"], [before[:-1], before[-1:], body], [b"", before, body], []):
        with pytest.raises(InvalidMessage):
            header_of(wrong)


@pytest.mark.parametrize("header", [b"[1]", b"null", b"{", b"\xff", b"[" * 100_000])
def test_a_header_that_is_no_object_is_refused(header: bytes) -> None:
    content = struct.pack("<8sQQ", b"flamelet", len(header), 0) + header
    with pytest.raises(InvalidMessage):
        Envelope.from_bytes(content)


@pytest.mark.parametrize(
    ("header_size", "body_size", "reason"),
    [
        (1 << 40, 0, "no envelope"),
        (2, 1 << 40, "at most 1,000 are read"),
        (2, 1001, "at most 1,000 are read"),
    ],
)
def test_a_length_that_is_claimed_takes_no_memory(header_size: int, body_size: int, reason: str) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(struct.pack("<8sQQ", b"flamelet", header_size, body_size) + b"{}")
        with pytest.raises(InvalidMessage, match=reason):
            receive(theirs, longest_body=1000)


def test_lengths_at_the_limits_are_read() -> None:
    text = b'{"a": "' + b"x" * ((1 << 20) - 9) + b'"}'
    content = struct.pack("<8sQQ", b"flamelet", len(text), 1000) + text + bytes(1000)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        writer = threading.Thread(target=ours.sendall, args=(content,))
        writer.start()
        assert len(receive(theirs, longest_body=1000).body) == 1000
        writer.join()
    with pytest.raises(InvalidMessage, match="bytes that are no envelope"):
        Envelope.from_bytes(struct.pack("<8sQQ", b"flamelet", (1 << 20) + 1, 0) + b'{"a": "x' + text[7:])


def test_a_header_of_another_protocol_is_refused() -> None:
    with pytest.raises(InvalidMessage, match="bytes that are no envelope"):
        Envelope.from_bytes(struct.pack("<8sQQ", b"flamexxx", 2, 0) + b"{}")


def test_a_first_piece_that_ends_within_its_header_is_refused_though_that_could_be_read() -> None:
    """Spaces after an object are JSON."""
    head = struct.pack("<8sQQ", b"flamelet", 4, 0)
    assert header_of([head + b"{}  "]) == {}
    with pytest.raises(InvalidMessage, match="first piece ends within its header"):
        header_of([head + b"{}", b"  "])


@pytest.mark.parametrize("value", [None, 3, ["x"], True])
def test_a_field_that_must_be_a_string_is_asked_for_as_one(value: object) -> None:
    with pytest.raises(InvalidMessage, match=r"field kind is .*; a string is needed"):
        Envelope({"kind": value}).text("kind")
