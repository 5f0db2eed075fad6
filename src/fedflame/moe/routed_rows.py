"""Sort rows by expert, one row per token and active expert.

Nothing here waits for a GPU but `blocks`, which a CPU alone uses.

Shapes: N tokens, k active experts, S = N*k routed rows, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

EVERYTHING = slice(None)


@dataclass(frozen=True)
class Block:
    """Consecutive experts with their rows."""

    rows: slice
    experts: slice
    offsets: Tensor
    """[experts] int32: the index after each expert's last row, counted from the block's first."""


class RoutedRows(NamedTuple):
    """The order of N*k routed rows: by expert, and back to tokens."""

    order: Tensor
    """[S] the index of each row in the flattened routing choices [N*k]."""
    tokens: Tensor
    """[S] the token of each row."""
    positions: Tensor
    """[N,k] the rows of each token."""
    offsets: Tensor
    """[E] int32: the index after each expert's last row."""

    @classmethod
    def sort(cls, top_k_index: Tensor, num_experts: int) -> RoutedRows:
        """Sort the routing choices [N,k] by expert, stably."""
        narrow = torch.uint8 if num_experts <= 256 else torch.int16  # a GPU sorts byte by byte
        experts, order = torch.sort(top_k_index.reshape(-1).to(narrow), stable=True)
        positions = torch.empty_like(order)
        positions[order] = torch.arange(order.numel(), device=order.device)
        numbers = torch.arange(num_experts, device=order.device, dtype=narrow)
        offsets = torch.searchsorted(experts, numbers, right=True, out_int32=True)
        return cls(order, order // top_k_index.shape[1], positions.view(top_k_index.shape), offsets)

    @property
    def per_expert(self) -> Tensor:
        """[E] int32: the number of rows of each expert."""
        return torch.diff(self.offsets, prepend=self.offsets.new_zeros(1))

    def blocks(self, rows: int, experts: int) -> list[Block]:
        """Group consecutive experts: a block ends at `experts` experts, or with at least `rows` rows."""
        found: list[Block] = []
        first = start = 0
        ends = self.offsets.tolist()
        for expert, end in enumerate(ends):
            if end - start >= rows or expert - first + 1 >= experts or expert == len(ends) - 1:
                together = slice(first, expert + 1)
                found.append(Block(slice(start, end), together, self.offsets[together] - start))
                first, start = expert + 1, end
        return found

    def one_block(self) -> Block:
        """Return all experts as one block, without waiting for a GPU to say how many rows they have."""
        return Block(EVERYTHING, EVERYTHING, self.offsets)


def tokens_of_experts(chosen: Tensor, counted: Tensor, num_experts: int) -> Tensor:
    """Return [E] int64: how many tokens with a 1 in `counted` [N] chose each expert, by `chosen` [N,k]."""
    of_choices = counted.unsqueeze(1).expand_as(chosen).reshape(-1)
    return counted.new_zeros(num_experts).index_add_(0, chosen.reshape(-1), of_choices)
