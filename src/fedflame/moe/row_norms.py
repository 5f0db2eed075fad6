"""The gradient norm of every row of a batch, from one backward that forms no gradient.

Rows of a batch do not meet: attention stays within a row, the routers are frozen, and experts compute token
by token. So the gradient of a bank is a sum over (expert, row) groups of routed rows, which are sorted by
expert and, within an expert, by row. The products of these groups are formed one block of experts at a time,
squared and forgotten. The same holds for attention LoRA, row by row, and for s.

Li et al.: Large Language Models Can Be Strong Differentially Private Learners (ghost clipping), arXiv
2110.05679. Here the norms of a group are those of its product, which costs less than Gram matrices where a
group has many tokens, as with few experts per row.

Shapes: B rows, N computed tokens, S routed rows, G groups.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from fedflame.moe.routed_rows import Block, RoutedRows

if TYPE_CHECKING:
    from fedflame.moe.adapted_model import AdaptedModel


@dataclass(frozen=True)
class Groups:
    """The routed rows of a block that belong to one expert and one row of the batch."""

    offsets: Tensor
    """[G] int32: the index after each group's last routed row."""
    rows: Tensor
    """[G] the row of the batch."""


class RowNorms:
    """Adds up the squared gradient norms of the rows of a batch, while `recording`.

    Args:
        row_of_token: [N] the row of each token that the experts compute.
        rows: of the batch.
    """

    def __init__(self, row_of_token: Tensor, rows: int) -> None:
        self.recording = False
        self.squares = row_of_token.new_zeros(rows, dtype=torch.float64)
        self._row_of_token, self._rows = row_of_token, rows

    def groups(self, routed: RoutedRows, block: Block) -> Groups:
        """Return the groups of a block."""
        row = self._row_of_token[routed.tokens[block.rows]]
        places = torch.arange(len(row), device=row.device)
        expert = torch.searchsorted(block.offsets, places, right=True)
        kinds, sizes = torch.unique_consecutive(expert * self._rows + row, return_counts=True)
        return Groups(sizes.cumsum(0, dtype=torch.int32), kinds % self._rows)

    def add(self, gradients: Tensor, rows: Tensor) -> None:
        """Add the squares of gradients [G,*], each of the row [G] with this number."""
        norms = torch.linalg.vector_norm(gradients.flatten(1), dim=1, dtype=torch.float64)
        self.squares.index_add_(0, rows, norms.square())

    def add_scalar(self, by_token: Tensor) -> None:
        """Add the square of a gradient that is a sum over the tokens [N] of a row."""
        by_row = self.squares.new_zeros(self._rows).index_add_(0, self._row_of_token, by_token.double())
        self.squares += by_row.square()

    def add_linear(self, d_out: Tensor, x: Tensor) -> None:
        """Add the squares of a weight's gradient, for the input x [B,*,in] and the gradient [B,*,out]."""
        d_out, x = (value.reshape(self._rows, -1, value.shape[-1]) for value in (d_out, x))
        gradients = d_out.mT @ x.to(d_out.dtype)
        self.squares += torch.linalg.vector_norm(gradients, dim=(1, 2), dtype=torch.float64).square()


@contextmanager
def row_norms(adapted: AdaptedModel, attention_mask: Tensor) -> Iterator[RowNorms]:
    """Within the block, a backward through the model can record the norms of the rows of this batch.

    Args:
        adapted: the model, all of it in float32 on one device.
        attention_mask: [B,T] of the batch, which is padded on the right.
    """
    rows, width = attention_mask.shape
    row_of_token = torch.arange(rows).unsqueeze(1).expand(rows, width)[attention_mask.bool()]
    norms = RowNorms(row_of_token.to(adapted.device), rows)
    with ExitStack() as stack:
        for module in adapted.model.modules():
            if isinstance(module, LoraLayer):
                for part in (module.lora_A, module.lora_B):
                    stack.callback(part["default"].register_forward_hook(_linear_hook(norms)).remove)
        for lora in adapted.loras:
            lora.row_norms = norms
        try:
            yield norms
        finally:
            for lora in adapted.loras:
                lora.row_norms = None


def _linear_hook(norms: RowNorms) -> Any:
    def on_forward(linear: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if not linear.weight.requires_grad:
            return
        x = inputs[0].detach()

        def on_backward(d_out: Tensor) -> None:
            if norms.recording:
                norms.add_linear(d_out, x)

        output.register_hook(on_backward)

    return on_forward
