"""Rows sorted by expert: one row per token and active expert, and the way back to tokens.

Both ways are single passes in a fixed order (no scattered additions), so the same run gives the
same bytes. Shapes: N tokens, k active experts, S = N*k routed rows, E experts, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag


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

    def blocks(self, rows: int, experts: int) -> list[Block]:
        """Consecutive experts together: at most `experts` of them, and no more once they have `rows` rows."""
        if rows >= self.tokens.numel() and experts >= len(self.per_expert):
            return [Block(slice(None), slice(None), self._offsets(self.per_expert))]
        found, first, start, end, last = [], 0, 0, 0, len(self.per_expert) - 1
        for expert, count in enumerate(self.per_expert.tolist()):
            end += count
            if end - start >= rows or expert - first + 1 >= experts or expert == last:
                together = slice(first, expert + 1)
                found.append(Block(slice(start, end), together, self._offsets(self.per_expert[together])))
                first, start = expert + 1, end
        return found

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

    @staticmethod
    def _offsets(per_expert: Tensor) -> Tensor:
        return torch.cumsum(per_expert, 0, dtype=torch.int32)


@dataclass(frozen=True)
class Block:
    """Some consecutive experts with their rows, and where each expert's rows end within them."""

    rows: slice
    experts: slice
    offsets: Tensor
    """[experts of the block] int32, as grouped_mm wants them."""
