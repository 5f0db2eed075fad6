"""The size that a packed buffer says of itself."""

from __future__ import annotations

import pytest

from fedflame.wire.packed_header import LONGEST, SIZE_BYTES, header_size


@pytest.mark.parametrize("start", [b"", b"\x05", b"\x05" + bytes(6)])
def test_a_start_without_the_whole_size_says_none(start: bytes) -> None:
    with pytest.raises(ValueError, match="does not begin as a packed buffer does"):
        header_size(start)


def test_a_header_has_at_most_so_many_bytes() -> None:
    assert header_size(LONGEST.to_bytes(8, "little")) == SIZE_BYTES + LONGEST
    with pytest.raises(ValueError, match="does not begin as a packed buffer does"):
        header_size((LONGEST + 1).to_bytes(8, "little"))
