"""Dropout on the inputs of the experts' A, as PEFT's lora_dropout has it on those of a linear map.

The masks come from torch's own generators, so that whoever seeds these decides them, and a layer that
gradient checkpointing runs again has the same. They are kept for the backward: a byte for each input.

Shapes: S routed rows, H hidden size, I expert width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Dropout:
    """Which inputs of one A are kept, [S,in], and what they are multiplied by."""

    kept: Tensor
    factor: float

    def __call__(self, rows: Tensor) -> Tensor:
        """Return rows [S,in] with zeros for what is dropped. The gradient goes back the same way."""
        return torch.where(self.kept, rows, 0) * self.factor


def draw_masks(rows: int, widths: Sequence[int], p: float, device: torch.device) -> list[Tensor]:
    """Draw for each width a mask [rows,width] that is true with the chance 1 - p; none where p is 0."""
    if not p:
        return []
    return [torch.empty(rows, width, dtype=torch.bool, device=device).bernoulli_(1 - p) for width in widths]
