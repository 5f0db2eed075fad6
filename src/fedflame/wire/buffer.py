"""Pack tensors and a JSON header into one safetensors buffer, and read them again."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from fedflame.wire.envelope import Bytes
from fedflame.wire.packed_header import KEY, read_packed_header

_DAMAGE = (
    SafetensorError,
    LookupError,
    TypeError,
    AttributeError,
    ValueError,
    ArithmeticError,
    RuntimeError,
)
"""What safetensors, torch and json raise at bytes that `pack` did not make."""


def pack(tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> bytes:
    """Pack tensors of any dtype and stride. The header goes into the safetensors metadata, as `fedflame`."""
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    return save(contiguous, metadata={KEY: json.dumps(header)})


def unpack(buffer: Bytes) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The inverse of `pack`, bit for bit.

    Raises:
        ValueError: the buffer is truncated, or `pack` did not make it.
    """
    buffer = bytes(buffer)  # safetensors reads bytes only, so a view is copied
    try:
        tensors = load(buffer)
    except _DAMAGE as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error
    return tensors, read_packed_header(buffer)


def views(buffer: memoryview) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read float32 tensors that this process has packed, as `unpack` does but without checks or copies.

    The layout is described at https://huggingface.co/docs/safetensors. A read-only buffer is copied, because
    torch needs a writable one.
    """
    writable = memoryview(bytearray(buffer)) if buffer.readonly else buffer
    start = 8 + int.from_bytes(buffer[:8], "little")
    entries = json.loads(bytes(buffer[8:start]))
    header = json.loads(entries.pop("__metadata__")[KEY])
    return {name: _view(writable[start:], **entry) for name, entry in entries.items()}, header


def _view(data: memoryview, dtype: str, shape: list[int], data_offsets: list[int]) -> Tensor:
    assert dtype == "F32", dtype
    count = math.prod(shape)
    values = (
        torch.frombuffer(data, dtype=torch.float32, count=count, offset=data_offsets[0])
        if count
        else torch.empty(0)
    )
    return values.reshape(shape)
