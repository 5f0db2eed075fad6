"""Plans and updates as bytes, what is in them, and such that are sealed again with other parts."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, get_args

import pytest
import torch
from hypothesis import strategies as st
from safetensors.torch import load, save
from tests.message_samples import a_plan, an_update
from torch import Tensor

from fedflame.config.words import UpdateDtype
from fedflame.messages import Adapter, ClientUpdate, half_of
from fedflame.wire.codec import decode_plan, decode_update, encode_plan, encode_update
from fedflame.wire.frame import seal, unseal
from fedflame.wire.planes import compress, decompress


def body_of(message: bytes) -> bytes:
    """The safetensors buffer of a plan or, compressed, of an update."""
    body = unseal(message)
    return bytes(body) if is_plan(message) else decompress(body, 1 << 20)


def is_plan(message: bytes) -> bool:
    """By the start of a safetensors header; a compressed body has a length there, never as large."""
    return unseal(message)[8:10] == b'{"'


def with_body(message: bytes, body: bytes) -> bytes:
    """Sealed as a message of the same kind."""
    return seal(body if is_plan(message) else compress(body))


def header_of(message: bytes) -> dict[str, Any]:
    body = body_of(message)
    size = int.from_bytes(body[:8], "little")
    return json.loads(json.loads(body[8 : 8 + size])["__metadata__"]["fedflame"])


def tensor_bytes(message: bytes) -> int:
    body = body_of(message)
    return len(body) - 8 - int.from_bytes(body[:8], "little")


def forge(message: bytes, header: dict[str, Any] | None = None, **tensors: Tensor | None) -> bytes:
    """Sealed again with other header fields and tensors; None removes. Dots in names are written `__`."""
    values: dict[str, Tensor | None] = {**load(body_of(message))}
    values |= {name.replace("__", "."): value for name, value in tensors.items()}
    fields_now = {
        name: value for name, value in (header_of(message) | (header or {})).items() if value is not ...
    }
    kept = {name: value.contiguous() for name, value in values.items() if value is not None}
    return with_body(message, save(kept, {"fedflame": json.dumps(fields_now)}))


def update_bytes(update: ClientUpdate, update_dtype: Any = "float32") -> bytes:
    return encode_update(update, replace(a_plan(), update_dtype=update_dtype))


def read_update(message: bytes, update_dtype: Any = "float32") -> ClientUpdate:
    return decode_update(message, replace(a_plan(), update_dtype=update_dtype))


any_float = st.floats(allow_nan=True, allow_infinity=True)


def half_update(trainable: Any) -> ClientUpdate:
    """An update with zero deltas in the other half, and experts of no activation in both layers."""
    update = an_update(counts=torch.tensor([[0, 3, 0, 1, 2], [0, 0, 0, 0, 5]]))
    values = {
        name: value if half_of(name) == trainable else torch.zeros_like(value)
        for name, value in update.delta.tensors().items()
    }
    return replace(update, delta=Adapter.from_tensors(values), trainable=trainable)


DECODERS: dict[str, tuple[Callable[[bytes], Any], bytes]] = {
    "plan": (decode_plan, encode_plan(a_plan())),
    **{
        f"update in {dtype}": (
            partial(read_update, update_dtype=dtype),
            update_bytes(an_update(), dtype),
        )
        for dtype in get_args(UpdateDtype)
    },
}
UPDATE = update_bytes(an_update())
both_kinds = pytest.mark.parametrize("kind", DECODERS)
