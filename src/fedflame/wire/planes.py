"""Lossless compression: split the bytes into four byte planes and Huffman-code each plane.

Byte plane i has the bytes i, i+4, i+8 and so on; for float32 one plane holds sign and exponent. Sign and
exponent of trained values take few of the 256 byte values, so their plane compresses well; mantissas do not.
int8 values compress in every plane. After ZipNN (Hershcovitch et al., arXiv 2411.05239).
"""

from __future__ import annotations

import struct
import zlib

import numpy as np

from fedflame.wire.envelope import Bytes

_PLACES = 4
"""Number of planes: the bytes of a float32. A bfloat16 takes two of them in turn."""
_HEAD = struct.Struct(f"<{1 + _PLACES}Q")
"""Length of the body, then the stored length of each plane, in bytes."""
_WORTH_BITS = 7.8
"""Bits of entropy per byte; above this, no code is tried."""
_RAW_DEFLATE = -15


def compress(body: bytes) -> bytes:
    """Compress a body without loss. The result is at most 40 bytes longer than `body`."""
    values = np.frombuffer(body, np.uint8)
    written = [_shorter(values[place::_PLACES]) for place in range(_PLACES)]
    return b"".join((_HEAD.pack(len(body), *map(len, written)), *written))


def decompress(message: Bytes, longest: int) -> bytes:
    """Return the body. `longest`, in bytes, limits the memory used, whatever the message claims.

    Raises:
        ValueError: the message is no compressed body, claims more than `longest` bytes, or has a wrong
            length.
    """
    if len(message) < _HEAD.size:
        raise ValueError(f"{len(message)} bytes that are no compressed body")
    size, *lengths = _HEAD.unpack_from(message)
    if sum(lengths) != len(message) - _HEAD.size:
        raise ValueError(f"{len(message):,} bytes that are no compressed body")
    if size > longest:
        raise ValueError(f"a body of {size:,} bytes; at most {longest:,} are allowed")
    values, start = np.empty(size, np.uint8), _HEAD.size
    for place, length in enumerate(lengths):
        written = memoryview(message)[start : start + length]
        values[place::_PLACES] = _whole(written, len(range(place, size, _PLACES)))
        start += length
    return values.tobytes()


def _shorter(plane: np.ndarray) -> bytes:
    """Return the Huffman code of the plane, or the plane itself if that is shorter."""
    if _entropy_bits(plane) > _WORTH_BITS:
        return plane.tobytes()
    coder = zlib.compressobj(wbits=_RAW_DEFLATE, strategy=zlib.Z_HUFFMAN_ONLY)
    coded = coder.compress(plane.tobytes()) + coder.flush()
    return coded if len(coded) < len(plane) else plane.tobytes()


def _whole(written: memoryview, size: int) -> np.ndarray:
    if len(written) == size:
        return np.frombuffer(written, np.uint8)
    decoder = zlib.decompressobj(_RAW_DEFLATE)
    try:
        plane = decoder.decompress(written, size) if size else b""
        beyond = decoder.decompress(decoder.unconsumed_tail, 1)  # only the end mark may be left
    except zlib.error as error:
        raise ValueError(f"a place of numbers that cannot be read: {error}") from error
    if len(plane) != size or beyond or not decoder.eof or decoder.unused_data or len(written) > size:
        raise ValueError(f"a place of numbers that is not {size:,} bytes")
    return np.frombuffer(plane, np.uint8)


def _entropy_bits(plane: np.ndarray) -> float:
    """Return the entropy in bits per byte; 0 for an empty plane."""
    share = np.bincount(plane, minlength=256) / max(1, len(plane))
    share = share[share > 0]
    return float(-(share * np.log2(share)).sum())
