"""Safetensors files that are none of ours, or that torch cannot hold, are refused by one exception."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from tests.same_bits import assert_same_bits

from fedflame.wire.buffer import pack, unpack

OURS = {"__metadata__": {"fedflame": "{}"}}


def file_of(header: Any, data: bytes = b"") -> bytes:
    """By the layout that safetensors documents."""
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def one_tensor(dtype: str, shape: list[int], size: int) -> bytes:
    return file_of(OURS | {"x": {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}}, bytes(size))


def test_a_file_of_the_documented_layout_is_read() -> None:
    tensors, header = unpack(one_tensor("F32", [0, 3], 0))
    assert header == {} and tensors["x"].shape == (0, 3)


@pytest.mark.parametrize(
    "buffer",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"\xff" * 8, id="a header of any length"),
        pytest.param(file_of([1]), id="a header that is no object"),
        pytest.param(file_of({}), id="no metadata"),
        pytest.param(file_of({"__metadata__": None}), id="metadata that are null"),
        pytest.param(file_of({"__metadata__": {}}), id="metadata of another"),
        pytest.param(file_of({"__metadata__": {"fedflame": "{"}}), id="no JSON"),
        pytest.param(file_of({"__metadata__": {"fedflame": "[1]"}}), id="JSON that is no object"),
        pytest.param(file_of({"__metadata__": {"fedflame": "[" * 100_000}}), id="JSON nested too deep"),
        pytest.param(file_of({"__metadata__": {"fedflame": "9" * 5000}}), id="JSON of too many digits"),
        pytest.param(one_tensor("F4", [2], 1), id="a dtype that torch has not"),
        pytest.param(one_tensor("F32", [0, 2**63], 0), id="a length of more than 63 bits"),
        pytest.param(one_tensor("F32", [0, 2**40, 2**40, 2**40], 0), id="strides of more than 64 bits"),
    ],
)
def test_what_is_none_of_ours_is_refused(buffer: bytes) -> None:
    with pytest.raises(ValueError):
        unpack(buffer)


def test_a_buffer_cut_at_any_length_is_refused() -> None:
    whole = pack({"x": torch.ones(2, 3), "y": torch.arange(4)}, {"round": 3})
    for length in range(len(whole)):
        with pytest.raises(ValueError):
            unpack(whole[:length])
    tensors, header = unpack(memoryview(whole))
    assert header == {"round": 3} and tensors.keys() == {"x", "y"}
    assert_same_bits(tensors["y"], torch.arange(4), "y")
