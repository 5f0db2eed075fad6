"""Rows sorted by expert: one row per token and active expert, and the way back to tokens.

Both ways are single passes in a fixed order (no scattered additions), so the same run gives the
same bytes. Shapes: N tokens, k active experts, S = N*k routed rows, E experts, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from fedflame.moe.expert_products import Padded, Ragged

PADDING = 2
"""Up to so many times the rows, one call with padding is quicker than a call per expert."""


@dataclass(frozen=True)
class RoutedRows:
    """How N*k routed rows are sorted by expert and back."""

    order: Tensor
    """[S] where each row stands in the routing choices [N,k], read token by token."""
    tokens: Tensor
    """[S] the token of each row."""
    positions: Tensor
    """[N,k] the row of each token's k experts."""
    per_expert: Tensor
    """[E] rows of each expert, int64."""

    @classmethod
    def sort(cls, top_k_index: Tensor, num_experts: int) -> RoutedRows:
        """Stable sort of the routing choices [N,k] by expert."""
        flat, k = top_k_index.reshape(-1), top_k_index.shape[1]
        order = torch.argsort(flat, stable=True)
        positions = torch.empty_like(order)
        positions[order] = torch.arange(order.numel(), device=order.device)
        return cls(order, order // k, positions.view(-1, k), torch.bincount(flat, minlength=num_experts))

    def blocks(self, rows: int, experts: int, padded: bool) -> list[Block]:
        """Consecutive experts together: at most `experts` of them, and no more once they have `rows` rows.

        With `padded` their thin products are padded, where that does not take much.
        """
        found, first, start, end, last = [], 0, 0, 0, len(self.per_expert) - 1
        for expert, count in enumerate(self.per_expert.tolist()):
            end += count
            if end - start >= rows or expert - first + 1 >= experts or expert == last:
                together = slice(first, expert + 1)
                found.append(Block.of(slice(start, end), together, self.per_expert[together], padded))
                first, start = expert + 1, end
        return found

    def one_block(self) -> Block:
        """All experts, without waiting for their numbers of rows."""
        return Block.of(slice(None), slice(None), self.per_expert, padded=False)

    def spread(self, per_expert: Tensor, block: Block) -> Tensor:
        """Each row's expert's values of `per_expert` [E,*]: [rows of the block,*]."""
        return per_expert[block.experts].repeat_interleave(self.per_expert[block.experts], dim=0)

    def sum_per_token(self, rows: Tensor) -> Tensor:
        """Each token's k rows of `rows` [S,H] added up, the bits being those of torch's sum: [N,H]."""
        count, k = self.positions.shape
        if rows.dtype == torch.float32:  # without a copy of the rows; in bfloat16 it would round otherwise
            return embedding_bag(self.positions, rows, mode="sum")
        in_order = rows.index_select(0, self.positions.reshape(-1))
        return in_order if k == 1 else in_order.view(count, k, -1).sum(1)


@dataclass(frozen=True)
class Block:
    """Some consecutive experts with their rows, and how these are multiplied."""

    rows: slice
    experts: slice
    wide: Ragged
    """With the matrices of the base."""
    thin: Ragged | Padded
    """With the low-rank factors."""

    @classmethod
    def of(cls, rows: slice, experts: slice, per_expert: Tensor, padded: bool) -> Self:
        wide = Ragged.of(per_expert)
        few = padded and 0 < len(per_expert) * int(per_expert.max()) <= PADDING * int(per_expert.sum())
        return cls(rows, experts, wide, Padded.of(per_expert) if few else wide)
