"""Tensors and adapters that must be equal in every bit: zeros by their sign, NaNs by their payload."""

from __future__ import annotations

import torch
from torch import Tensor

from fedflame.messages import Adapter


def bits(value: Tensor) -> Tensor:
    """Numbers in float32 as integers of the same bits; others as they are."""
    return value.contiguous().view(torch.int32 if value.dtype == torch.float32 else value.dtype)


def assert_same_bits(got: Tensor, wanted: Tensor, name: object) -> None:
    assert (got.shape, got.dtype) == (wanted.shape, wanted.dtype), name
    assert torch.equal(bits(got), bits(wanted)), name


def assert_same_adapter(got: Adapter, wanted: Adapter) -> None:
    values, others = got.tensors(), wanted.tensors()
    assert values.keys() == others.keys()
    for name, other in others.items():
        assert_same_bits(values[name], other, name)
