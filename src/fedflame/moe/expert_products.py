"""Products of rows with the matrix of their expert, in one of two layouts.

`Ragged` keeps the rows as they are sorted and multiplies expert by expert: nothing is wasted, and a
wide product is all arithmetic. `Padded` gives every expert as many rows as the largest has and
multiplies all of them in one call: where experts have few rows, the calls of thin low-rank products
cost more than their arithmetic. Both have the same functions.

Shapes: S routed rows, E experts, m rows of the largest.
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
    """[E] int32: where each expert's rows end."""

    @classmethod
    def of(cls, per_expert: Tensor) -> Self:
        """For so many rows [E] per expert."""
        return cls(torch.cumsum(per_expert, 0, dtype=torch.int32))

    def take(self, rows: Tensor) -> Tensor:
        """Sorted rows [S,*] in this layout."""
        return rows

    def give(self, rows: Tensor) -> Tensor:
        """Rows of this layout as sorted rows [S,*]."""
        return rows

    def scale_(self, rows: Tensor, factor: float) -> Tensor:
        """Scale rows in place; what is no row becomes zero, so that `outer` with it is right."""
        return rows.mul_(factor)

    def times(self, rows: Tensor, weights: Tensor) -> Tensor:
        """Rows of width a times weights [E,a,b] of their expert: of width b."""
        return grouped_mm(rows, weights, offs=self.offsets)

    def outer(self, left: Tensor, right: Tensor) -> Tensor:
        """The sum of left' right over each expert's rows, [E,a,b]; zero without rows."""
        return grouped_mm(left.mT, right, offs=self.offsets)


@dataclass(frozen=True)
class Padded:
    """Rows [E,m,*]: behind each expert's own stand others, without meaning."""

    places: Tensor
    """[E*m] the sorted row that stands in each place."""
    back: Tensor
    """[S] the place of each sorted row."""
    real: Tensor
    """[E,m,1] 1 where a row of the expert stands, else 0."""

    @classmethod
    def of(cls, per_expert: Tensor) -> Self:
        """For so many rows [E] per expert, of which one at least has some."""
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
