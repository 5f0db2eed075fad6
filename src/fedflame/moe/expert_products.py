"""Multiply each row with the matrix of its expert, in one of two layouts with the same functions.

`Ragged` keeps the rows sorted by expert and multiplies expert by expert. It does no needless arithmetic and
is best for the wide products of the base. `Padded` pads every expert to the same number of rows and
multiplies all experts in one call. It is best for low-rank products of few rows, where a call costs more than
its arithmetic.

Shapes: S routed rows, E experts, m rows of the expert that has most.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm


@dataclass(frozen=True)
class Ragged:
    """Rows [S,*] sorted by expert."""

    offsets: Tensor
    """[E] int32: the index after each expert's last row."""

    @classmethod
    def of(cls, per_expert: Tensor) -> Self:
        """Build the layout for `per_expert` [E] rows."""
        return cls(torch.cumsum(per_expert, 0, dtype=torch.int32))

    def take(self, rows: Tensor) -> Tensor:
        """Bring sorted rows [S,*] into this layout."""
        return rows

    def give(self, rows: Tensor) -> Tensor:
        """Bring rows of this layout back to sorted rows [S,*]."""
        return rows

    def scale_(self, rows: Tensor, factor: float) -> Tensor:
        """Scale rows in place. Padding rows become zero, so that they add nothing to `outer`."""
        return rows.mul_(factor)

    def times(self, rows: Tensor, weights: Tensor) -> Tensor:
        """Multiply rows of width a with the weights [E,a,b] of their expert; the result has width b."""
        return grouped_mm(rows, weights, offs=self.offsets)

    def outer(self, left: Tensor, right: Tensor) -> Tensor:
        """Return [E,a,b]: the sum of left' right over each expert's rows; zero for experts without rows."""
        return grouped_mm(left.mT, right, offs=self.offsets)


@dataclass(frozen=True)
class Padded:
    """Rows [E,m,*]: each expert's own rows first, then arbitrary rows as padding."""

    places: Tensor
    """[E*m] the index of the sorted row in each place."""
    back: Tensor
    """[S] the place of each sorted row."""
    real: Tensor
    """[E,m,1] true for the expert's own rows, false for padding."""

    @classmethod
    def of(cls, per_expert: Tensor) -> Self:
        """Build the layout for `per_expert` [E] rows; at least one expert must have a row."""
        ends = torch.cumsum(per_expert, 0)
        place = torch.arange(int(per_expert.max()), device=per_expert.device)
        real = place < per_expert.unsqueeze(1)
        places = (ends - per_expert).unsqueeze(1) + place
        back = real.flatten().nonzero().squeeze(1)
        return cls(places.clamp_(max=len(back) - 1).flatten(), back, real.unsqueeze(2))

    def take(self, rows: Tensor) -> Tensor:
        return rows.index_select(0, self.places).view(*self.real.shape[:2], -1)

    def give(self, rows: Tensor) -> Tensor:
        return rows.flatten(0, 1).index_select(0, self.back)

    def scale_(self, rows: Tensor, factor: float) -> Tensor:
        return rows.mul_(self.real * factor)

    def times(self, rows: Tensor, weights: Tensor) -> Tensor:
        return torch.bmm(rows, weights)

    def outer(self, left: Tensor, right: Tensor) -> Tensor:
        return torch.bmm(left.mT, right)
