"""The seal: any body comes back, and any damage is found."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedflame.errors import InvalidMessage
from fedflame.wire.frame import opened, seal, seal_digest, unseal


@given(st.binary(max_size=100))
def test_any_body_comes_back_and_its_digest_is_blake2b(body: bytes) -> None:
    message = seal(body)
    assert bytes(unseal(message)) == bytes(opened(message)) == body
    assert seal_digest(message) == hashlib.blake2b(body, digest_size=32).hexdigest()


def test_a_body_of_no_bytes_comes_back() -> None:
    assert bytes(unseal(seal(b""))) == b""


def test_each_flipped_bit_and_each_byte_too_few_or_too_many_is_refused() -> None:
    message = seal(b"body")
    for bit in range(8 * len(message)):
        changed = bytearray(message)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(InvalidMessage):
            unseal(bytes(changed))
    for wrong in (*(message[:length] for length in range(len(message))), message + b"\0"):
        with pytest.raises(InvalidMessage):
            unseal(wrong)
