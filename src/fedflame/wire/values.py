"""Round the values of an update for sending: fp32 (unchanged), bfloat16, or int8 with a scale per matrix."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedflame.config.words import UpdateDtype

_STEPS = 127
_SCALES = "scales."
_DTYPES: dict[UpdateDtype, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
}


def rounded(values: Mapping[str, Tensor], dtype: UpdateDtype) -> dict[str, Tensor]:
    """Round fp32 matrices [..., m, n] to `dtype`; int8 adds scales [...], one per matrix."""
    if dtype == "float32":
        return dict(values)
    if dtype == "bfloat16":
        return {name: value.to(torch.bfloat16) for name, value in values.items()}
    travels = {}
    for name, value in values.items():
        travels[name], travels[_SCALES + name] = _quantize(value)
    return travels


def restored(travelled: Mapping[str, Tensor], dtype: UpdateDtype) -> dict[str, Tensor]:
    """Return fp32 values from the tensors that `rounded` made."""
    if dtype == "int8":
        return {
            name: value * travelled[_SCALES + name][..., None, None]
            for name, value in travelled.items()
            if not name.startswith(_SCALES)
        }
    return {name: value.to(torch.float32) for name, value in travelled.items()}


def layout(
    shapes: Mapping[str, tuple[int, ...]], dtype: UpdateDtype
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Return the shape and dtype of every tensor that `rounded` makes from values of these shapes."""
    found = {name: (shape, _DTYPES[dtype]) for name, shape in shapes.items()}
    if dtype == "int8":
        found |= {_SCALES + name: (shape[:-2], torch.float32) for name, shape in shapes.items()}
    return found


def _quantize(value: Tensor) -> tuple[Tensor, Tensor]:
    """Return int8 steps and the step size of each matrix: its largest magnitude is 127 steps.

    A value that is not finite makes the step size not finite, and the receiver refuses the update.
    """
    if not value.numel():
        return value.to(torch.int8), value.new_zeros(value.shape[:-2])
    scales = value.abs().amax((-2, -1)) / _STEPS
    per_value = scales[..., None, None]
    steps = torch.where(per_value > 0, value / per_value, 0.0).round().clamp(-_STEPS, _STEPS)
    return steps.to(torch.int8), scales
