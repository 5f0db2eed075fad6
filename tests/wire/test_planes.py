"""Compressed bytes: they come back, are few where it pays, and are read in bounded memory."""

from __future__ import annotations

import struct
import tracemalloc
import zlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.examples_drawn import MANY

from fedflame.wire.planes import compress, decompress

HEAD = struct.Struct("<5Q")


def by_hand(message: bytes) -> bytes:
    """Byte by byte, by zlib's other function."""
    size, *lengths = HEAD.unpack_from(message)
    body, start = bytearray(size), HEAD.size
    for place, length in enumerate(lengths):
        written, numbers = message[start : start + length], range(place, size, 4)
        plane = written if length == len(numbers) else zlib.decompress(written, wbits=-15)
        for index, number in zip(numbers, plane, strict=True):
            body[index] = number
        start += length
    assert start == len(message)
    return bytes(body)


few_numbers = st.integers(0, 2000).map(lambda count: bytes(range(7)) * count)


@settings(deadline=None)
@given(st.binary(max_size=60) | few_numbers)
def test_any_bytes_come_back(body: bytes) -> None:
    message = compress(body)
    assert len(message) <= len(body) + HEAD.size
    assert decompress(message, len(body)) == by_hand(message) == body


@pytest.mark.parametrize(
    ("dtype", "most"), [(torch.float32, 0.87), (torch.bfloat16, 0.75), (torch.int8, 0.95)]
)
def test_numbers_around_zero_take_fewer_bytes(dtype: torch.dtype, most: float) -> None:
    values = torch.randn(30_001, generator=torch.Generator().manual_seed(0)) * (
        20 if dtype == torch.int8 else 0.02
    )
    body = bytes(values.to(dtype).view(torch.uint8).tolist())
    assert len(compress(body)) < most * len(body)


def test_of_bytes_without_a_pattern_none_is_lost_or_won() -> None:
    body = bytes(torch.randint(0, 256, (9_999,), generator=torch.Generator().manual_seed(0)).tolist())
    assert len(compress(body)) == len(body) + HEAD.size


def test_a_code_as_long_as_its_bytes_is_not_taken_for_them() -> None:
    """Whoever reads a place tells bytes from a code by their number."""
    plane = bytes(14)
    coder = zlib.compressobj(wbits=-15, strategy=zlib.Z_HUFFMAN_ONLY)
    assert len(coder.compress(plane) + coder.flush()) == len(plane)
    body = plane * 4
    assert decompress(compress(body), len(body)) == body


def test_bytes_without_a_pattern_are_not_even_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedflame.wire.planes.zlib.compressobj", None)
    body = bytes(torch.randint(0, 256, (9_999,), generator=torch.Generator().manual_seed(0)).tolist())
    assert decompress(compress(body), len(body)) == body


@settings(max_examples=MANY, deadline=None)
@given(few_numbers, st.data())
def test_changed_bytes_are_refused_or_other_bytes_of_the_size_that_is_claimed(
    body: bytes, data: st.DataObject
) -> None:
    message = bytearray(compress(body))
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, HEAD.size) | st.integers(0, len(message)))
        message[start : start + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    try:
        got = decompress(bytes(message), 100_000)
    except ValueError as reason:
        assert str(reason)
    else:
        assert len(got) == HEAD.unpack_from(message)[0] <= 100_000
        assert got == by_hand(bytes(message))


def claiming(size: int, *planes: bytes) -> bytes:
    return HEAD.pack(size, *map(len, planes)) + b"".join(planes)


def deflated(plane: bytes) -> bytes:
    coder = zlib.compressobj(9, wbits=-15)
    return coder.compress(plane) + coder.flush()


@pytest.mark.parametrize(
    "message",
    [
        claiming(1 << 60, b"", b"", b"", b""),
        claiming(4_000_000, *[deflated(bytes(1 << 28))] * 4),
        claiming(1 << 40, *[deflated(bytes(1 << 28))] * 4),
        claiming(1, b"x", deflated(bytes(1 << 28)), b"", b""),
        HEAD.pack(8, *[1 << 62] * 4),
    ],
)
def test_what_is_claimed_or_blown_up_takes_no_memory(message: bytes) -> None:
    tracemalloc.start()
    with pytest.raises(
        ValueError, match=r"at most 4,000,000 are allowed|that is not (1,000,000|0) bytes|no compressed"
    ):
        decompress(message, 4_000_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8_000_000


@pytest.mark.parametrize(
    "planes",
    [
        (b"x", deflated(bytes(100))[:-1], b"x", b"x"),
        (b"x", deflated(bytes(100)) + b"x", b"x", b"x"),
        (b"x", deflated(bytes(99)), b"x", b"x"),
        (b"x", deflated(bytes(101)), b"x", b"x"),
        (b"x", b"\xff\xff", b"x", b"x"),
        (b"x", deflated(bytes(range(100))), b"x", b"x"),  # the right bytes, but in more than they are
    ],
)
def test_a_code_of_other_bytes_than_its_place_has_is_refused(planes: tuple[bytes, ...]) -> None:
    whole = tuple(bytes(100) if plane == b"x" else plane for plane in planes)
    with pytest.raises(ValueError, match=r"a place of numbers that"):
        decompress(claiming(400, *whole), 400)


@pytest.mark.parametrize("length", range(HEAD.size))
def test_less_than_a_head_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match="that are no compressed body"):
        decompress(compress(b"x")[:length], 10)
