"""The gradient norm of every row of a batch, and the sum of the gradients with each scaled, in one backward.

Rows of a batch do not meet: attention stays within a row, the routers are frozen, and experts compute token
by token. So the gradient of a bank is a sum over (expert, row) groups of routed rows, which are sorted by
expert and, within an expert, by row. The products of these groups are formed one block of experts at a time,
squared and forgotten. The same holds for attention LoRA, row by row, and for s.

The norms say how far each row is scaled. A bank's gradient is linear in the gradient of its layer's output,
and follows from it with every row scaled, layer by layer. So nothing runs back through the whole model again.

Li et al.: Large Language Models Can Be Strong Differentially Private Learners (ghost clipping), arXiv
2110.05679; Bu et al.: Differentially Private Optimization on Large Model at Small Cost (book-keeping), arXiv
2210.00038. Here the norms of a group are those of its product, which costs less than Gram matrices where a
group has many tokens, as with few experts per row.

Shapes: B rows, N computed tokens, S routed rows, G groups.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from fedflame.errors import UserError
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
    """Adds up the squared gradient norms of the rows of a batch in a backward.

    It keeps what it takes to form the sum of the gradients when it is known how far each is scaled.

    Args:
        row_of_token: [N] the row of each token that the experts compute.
        rows: of the batch.
    """

    def __init__(self, row_of_token: Tensor, rows: int) -> None:
        self.squares = row_of_token.new_zeros(rows, dtype=torch.float64)
        self.row_of_token, self._rows = row_of_token, rows
        self._kept: list[tuple[Sequence[Tensor], Callable[[Tensor], Sequence[Tensor | None]]]] = []

    def groups(self, routed: RoutedRows, block: Block) -> Groups:
        """Return the groups of a block."""
        row = self.row_of_token[routed.tokens[block.rows]]
        places = torch.arange(len(row), device=row.device)
        expert = torch.searchsorted(block.offsets, places, right=True)
        kinds, sizes = torch.unique_consecutive(expert * self._rows + row, return_counts=True)
        return Groups(sizes.cumsum(0, dtype=torch.int32), kinds % self._rows)

    def add(self, gradients: Tensor, rows: Tensor) -> None:
        """Add the squares of gradients [G,*], each of the row [G] with this number."""
        self.squares.index_add_(0, rows, _squares(gradients))

    def keep(self, values: Sequence[Tensor], scaled: Callable[[Tensor], Sequence[Tensor | None]]) -> None:
        """Keep for trained values what returns their gradients, each row's scaled by a factor [B]."""
        self._kept.append((values, scaled))

    def scalar(self, value: Tensor, by_token: Tensor) -> None:
        """Add the square of a scalar's gradient, the sum over the tokens [N] of a row, and keep it."""
        by_row = self.squares.new_zeros(self._rows).index_add_(0, self.row_of_token, by_token.double())
        self.squares += by_row.square()
        self.keep([value], lambda factors: [(by_row * factors).sum()])

    def linear(self, weight: Tensor, d_out: Tensor, x: Tensor) -> None:
        """Add the squares of a weight's gradient, and keep it.

        Args:
            weight: [out,in].
            d_out: [B,*,out] the gradient of the product.
            x: [B,*,in] the input.
        """
        d_out, x = (value.reshape(self._rows, -1, value.shape[-1]) for value in (d_out, x.to(d_out.dtype)))
        self.squares += _squares(d_out.mT @ x)
        self.keep(
            [weight],
            lambda factors: [
                (d_out * factors.to(d_out.dtype)[:, None, None]).flatten(0, 1).mT @ x.flatten(0, 1)
            ],
        )

    @torch.no_grad()
    def sums(self, factors: Tensor) -> dict[Tensor, Tensor]:
        """Return by trained value the sum over the rows of its gradient times the row's factor [B].

        Raises:
            UserError: rows have passed a value twice. Their norms would be more than what was counted.
        """
        found: dict[Tensor, Tensor] = {}
        for values, scaled in self._kept:
            if any(value in found for value in values):
                raise UserError("rows pass a module of this model twice; set privacy.clipping=row")
            for value, gradient in zip(values, scaled(factors), strict=True):
                if gradient is not None:
                    found[value] = gradient.to(value.dtype)
        return found


def _squares(gradients: Tensor) -> Tensor:
    """Return the squared norm of each of the gradients [G,*] in float64.

    The norm itself is taken in float32, as the gradients are, in a quarter of the time. One that does not fit
    is infinite, and its row adds nothing.
    """
    norms: Tensor = torch.linalg.vector_norm(gradients.flatten(1), dim=1)
    return norms.double().square()


@contextmanager
def row_norms(adapted: AdaptedModel, attention_mask: Tensor) -> Iterator[RowNorms]:
    """Within the block, a backward through the model records the norms of the rows of this batch.

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
    def on_forward(linear: nn.Linear, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if linear.weight.requires_grad:
            x = inputs[0].detach()
            output.register_hook(lambda d_out: norms.linear(linear.weight, d_out, x))

    return on_forward
