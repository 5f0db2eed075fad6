"""Sort rows by expert, one row per token and active expert, and sum them per token afterwards.

Both directions add in a fixed order (no scattered additions), so the same run gives the same bytes.
Shapes: N tokens, k active experts, S = N*k routed rows, E experts, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from fedflame.moe.expert_products import Padded, Ragged

PADDING = 2
"""Pad if this gives at most so many times the rows: then one call is faster than one call per expert."""


@dataclass(frozen=True)
class RoutedRows:
    """The order of N*k routed rows: by expert, and back to tokens."""

    order: Tensor
    """[S] the index of each row in the flattened routing choices [N*k]."""
    tokens: Tensor
    """[S] the token of each row."""
    positions: Tensor
    """[N,k] the rows of each token."""
    per_expert: Tensor
    """[E] int64: the number of rows of each expert."""

    @classmethod
    def sort(cls, top_k_index: Tensor, num_experts: int) -> RoutedRows:
        """Sort the routing choices [N,k] by expert, stably."""
        flat, k = top_k_index.reshape(-1), top_k_index.shape[1]
        order = torch.argsort(flat, stable=True)
        positions = torch.empty_like(order)
        positions[order] = torch.arange(order.numel(), device=order.device)
        return cls(order, order // k, positions.view(-1, k), torch.bincount(flat, minlength=num_experts))

    def blocks(self, rows: int, experts: int, padded: bool) -> list[Block]:
        """Group consecutive experts: a block ends at `experts` experts, or once it has at least `rows` rows.

        With `padded` the low-rank products of a block are padded, unless that adds too many rows (`PADDING`).
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
        """Return all experts as one block, without waiting for the GPU to return the row counts."""
        return Block.of(slice(None), slice(None), self.per_expert, padded=False)

    def spread(self, per_expert: Tensor, block: Block) -> Tensor:
        """Repeat the values `per_expert` [E,*] for each row of the block: [rows of the block,*]."""
        return per_expert[block.experts].repeat_interleave(self.per_expert[block.experts], dim=0)

    def sum_per_token(self, rows: Tensor) -> Tensor:
        """Add up the k rows of each token: [S,H] to [N,H]; bit-identical to torch's sum."""
        count, k = self.positions.shape
        if rows.dtype == torch.float32:  # without a copy; bfloat16 would round otherwise
            return embedding_bag(self.positions, rows, mode="sum")
        in_order = rows.index_select(0, self.positions.reshape(-1))
        return in_order if k == 1 else in_order.view(count, k, -1).sum(1)


@dataclass(frozen=True)
class Block:
    """Consecutive experts with their rows, and the layouts of their products."""

    rows: slice
    experts: slice
    wide: Ragged
    """The layout for products with the base weights."""
    thin: Ragged | Padded
    """The layout for products with the low-rank factors."""

    @classmethod
    def of(cls, rows: slice, experts: slice, per_expert: Tensor, padded: bool) -> Self:
        wide = Ragged.of(per_expert)
        few = padded and 0 < len(per_expert) * int(per_expert.max()) <= PADDING * int(per_expert.sum())
        return cls(rows, experts, wide, Padded.of(per_expert) if few else wide)
