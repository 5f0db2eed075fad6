"""What happens to rows between the products of the experts: one source, eager on a CPU and compiled on CUDA.

Each function is one pass over its rows once it is compiled; run eagerly it is a few. It reads no value, so
that nothing waits for a GPU.

Shapes: S rows sorted by expert, N tokens, k active experts, n projections side by side, I expert width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag


@dataclass(frozen=True)
class Gate:
    """The activation of a family, row by row: [S,nI], in the order of the weights, to [S,I]."""

    of_parts: Callable[..., Tensor]
    parts: int = 1
    """It takes [S,nI] in so many parts of equal width. The gradient of each goes straight to its place; that
    of a whole, which the activation splits itself, is put together twice."""

    def __call__(self, inner: Tensor) -> Tensor:
        return self.of_parts(*inner.chunk(self.parts, 1))


def gated(activation: Callable[[Tensor], Tensor], gate: Tensor, up: Tensor) -> Tensor:
    """Return activation(gate) * up, what most families compute."""
    return activation(gate.view_as(gate)) * up  # what counts FLOPs by module cannot take a leaf of a vjp


def with_tail(rows: Tensor, tail: Tensor) -> Tensor:
    """Put the columns `tail` [S,n], or [n] for every row, behind rows [S,*]."""
    return torch.cat([rows, tail.to(rows.dtype).expand(len(rows), -1)], 1)


def to_gather(rows: Tensor, tail: Tensor) -> Tensor:
    """Return what `gathered` takes of rows that are to be gathered with this tail behind each.

    Compiled, gathering and tail are one pass. Run eagerly they would be two, over as many rows as there are
    experts per token; so the tail is put behind every row once.
    """
    return rows if torch.compiler.is_compiling() else with_tail(rows, tail)


def gathered(rows: Tensor, positions: Tensor, tail: Tensor) -> Tensor:
    """Gather rows, made ready by `to_gather`, with the tail behind each: [S,*]."""
    chosen = rows.index_select(0, positions)
    return with_tail(chosen, tail) if torch.compiler.is_compiling() else chosen


def weighted_gate(gate: Gate, inner: Tensor, weights: Tensor, constant: Tensor) -> Tensor:
    """Return w * gate(inner), [S,I], with the tail w * constant [n] behind it; w [S,1] is the routing weight.

    The weight multiplies the input of the last product, which is linear, so that only a sum is left after it.
    """
    return with_tail((gate(inner) * weights).to(inner.dtype), weights * constant)


def gate_backward(
    gate: Gate, inner: Tensor, d_weighted: Tensor, weights: Tensor, room: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Run back through `weighted_gate`, computing its activation again.

    Args:
        gate: the activation. torch.func.vjp takes any family's, and compiles into one graph.
        inner: [S,nI] what it was applied to.
        d_weighted: [S,I] the gradient of the weighted activation.
        weights: [S,1] routing weights.
        room: columns of the tail behind the result's gradient.

    Returns:
        The weighted activation [S,I], the gradient of `inner` with its tail [S,nI+room], and the gradient of
        the weights [S] in float32.
    """
    activation, backward = torch.func.vjp(gate.of_parts, *inner.chunk(gate.parts, 1))  # type: ignore[misc]
    d_weights = (d_weighted.float() * activation.float()).sum(1)
    d_parts = backward((d_weighted * weights).to(activation.dtype))
    weighted = (activation * weights).to(activation.dtype)
    d_inner = torch.cat([*d_parts, inner.new_zeros(room).expand(len(inner), -1)], 1)
    return weighted, d_inner, d_weights


def sum_per_token(rows: Tensor, positions: Tensor) -> Tensor:
    """Add up the k rows of each token, [S,H] to [N,H]; `positions` [N,k] says where they are.

    The order is fixed (no scattered additions), so the same run gives the same bytes.
    """
    if torch.compiler.is_compiling():  # the kernel of an indexed sum takes three times as long
        chosen = (rows.index_select(0, position).float() for position in positions.unbind(1))
        return sum(chosen, torch.zeros((), device=rows.device)).to(rows.dtype)
    if rows.dtype == torch.float32:  # torch's sum bit for bit, without a copy
        return embedding_bag(positions, rows, mode="sum")
    return rows[positions].sum(1)
