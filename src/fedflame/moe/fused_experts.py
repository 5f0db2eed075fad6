"""Experts with LoRA as one autograd function: base and low-rank products on rows sorted by expert.

Plain autograd would keep every intermediate of every layer until its backward. Here only the
gate/up pre-activation and the two rank-R projections are kept; all else is computed again or never
needed: the base is frozen, and the gradient of a routing weight comes from the expert's activation
instead of its output. With y = w (W2 a + b2 + c B2 A2 a) and g = dy, b2 the bias of families that
have one: dw = a . (W2' g + c A2' B2' g) + b2 . g.

Shapes: N tokens, k active experts, S = N*k routed rows, E experts, H hidden, I expert width, R rank,
n projections before the activation: gate and up, or up alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import grouped_mm

from fedflame.moe.routed_rows import Block, RoutedRows

Gate = Callable[[Tensor], Tensor]
"""The family's own activation: rows [S,nI], as the weights order them, to [S,I], each by itself."""

BLOCK_BYTES = 4 * 2**20
"""Size of the largest temporary [rows,2I] of a block of experts: what stays in a core's cache."""


@dataclass(frozen=True)
class FrozenExperts:
    """What the base model computes in an MoE layer."""

    gate_up: Tensor
    """[E,nI,H]"""
    down: Tensor
    """[E,H,I]"""
    gate_up_bias: Tensor | None
    """[E,nI]"""
    down_bias: Tensor | None
    """[E,H]"""
    gate: Gate


class FusedExperts(torch.autograd.Function):
    """`apply(x, weights, a1, b1, a2, b2, frozen, scaling, rows)` -> [N,H].

    x [N,H]; routing weights [N,k]; banks A1 [E,nR,H], B1 [E,nI,nR] block-diagonal, its rows ordered as
    those of the frozen weights, A2 [E,R,I] and B2 [E,H,R] in the dtype of x.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weights: Tensor,
        a1: Tensor,
        b1: Tensor,
        a2: Tensor,
        b2: Tensor,
        frozen: FrozenExperts,
        scaling: float,
        rows: RoutedRows,
    ) -> Tensor:
        row_weights = weights.reshape(-1)[rows.order].unsqueeze(1)
        dtype = torch.promote_types(x.dtype, weights.dtype)
        kept, outputs = [], torch.empty(len(rows.order), x.shape[1], dtype=dtype, device=x.device)
        blocks = rows.blocks(BLOCK_BYTES // (frozen.gate_up.shape[1] * x.dtype.itemsize))
        for block in blocks:
            routed, e = x.index_select(0, rows.tokens[block.rows]), block.experts
            low1 = _times_transposed(routed, a1[e], block).mul_(scaling)
            inner = _times_transposed(routed, frozen.gate_up[e], block)
            if frozen.gate_up_bias is not None:
                inner += rows.spread(frozen.gate_up_bias, block)
            inner += _times_transposed(low1, b1[e], block)
            activation = frozen.gate(inner)
            low2 = _times_transposed(activation, a2[e], block).mul_(scaling)
            output = _times_transposed(activation, frozen.down[e], block)
            if frozen.down_bias is not None:
                output += rows.spread(frozen.down_bias, block)
            output += _times_transposed(low2, b2[e], block)
            torch.mul(output, row_weights[block.rows], out=outputs[block.rows])
            kept += [inner, low1, low2]
        ctx.save_for_backward(x, weights, a1, b1, a2, b2, *kept)
        ctx.frozen, ctx.scaling, ctx.rows, ctx.blocks = frozen, scaling, rows, blocks
        return rows.sum_per_token(outputs).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weights, a1, b1, a2, b2, *kept = ctx.saved_tensors
        frozen, rows, scaling, d_y = ctx.frozen, ctx.rows, ctx.scaling, d_y.contiguous()
        row_weights = weights.reshape(-1)[rows.order].unsqueeze(1).to(x.dtype)
        d_weights = torch.empty(len(rows.order), dtype=torch.float32, device=x.device)
        d_rows = x.new_empty(len(rows.order), x.shape[1])
        trained = ctx.needs_input_grad[2:6]
        d_a1, d_b1, d_a2, d_b2 = banks = [
            torch.empty_like(bank) if wanted else None
            for bank, wanted in zip((a1, b1, a2, b2), trained, strict=True)
        ]
        for number, block in enumerate(ctx.blocks):
            inner, low1, low2 = kept[3 * number : 3 * number + 3]
            tokens, e = rows.tokens[block.rows], block.experts
            w = row_weights[block.rows]
            d_out = d_y.index_select(0, tokens)
            with torch.enable_grad():
                inner = inner.detach().requires_grad_()
                activation = frozen.gate(inner)
            d_low2 = _times(d_out, b2[e], block).mul_(scaling)
            d_activation = _times(d_out, frozen.down[e], block).add_(_times(d_low2, a2[e], block))
            d_weights[block.rows] = torch.linalg.vecdot(d_activation.float(), activation.detach().float())
            if frozen.down_bias is not None:
                bias = rows.spread(frozen.down_bias, block)
                d_weights[block.rows] += torch.linalg.vecdot(d_out.float(), bias.float())
            if d_a2 is not None:
                d_a2[e] = _outer(d_low2.mul_(w), activation.detach(), block)
            if d_b2 is not None:
                d_b2[e] = _outer(d_out, low2 * w, block)
            (d_inner,) = torch.autograd.grad(activation, inner, d_activation.mul_(w))
            d_low1 = _times(d_inner, b1[e], block).mul_(scaling)
            if d_b1 is not None:
                d_b1[e] = _outer(d_inner, low1, block)
            if d_a1 is not None:
                d_a1[e] = _outer(d_low1, x.index_select(0, tokens), block)
            d_routed = _times(d_inner, frozen.gate_up[e], block)
            torch.add(d_routed, _times(d_low1, a1[e], block), out=d_rows[block.rows])
        d_x = rows.sum_per_token(d_rows)
        d_weights = d_weights[rows.positions].to(weights.dtype)
        return d_x, d_weights, *banks, None, None, None


def _times(rows: Tensor, weights: Tensor, block: Block) -> Tensor:
    """Rows [S,out], sorted by expert, times weights [E,out,in] of their expert: [S,in]."""
    return grouped_mm(rows, weights, offs=block.offsets)


def _times_transposed(rows: Tensor, weights: Tensor, block: Block) -> Tensor:
    """Rows [S,in], sorted by expert, times weights [E,out,in] of their expert, transposed: [S,out]."""
    return grouped_mm(rows, weights.mT, offs=block.offsets)


def _outer(left: Tensor, right: Tensor, block: Block) -> Tensor:
    """The sum of left' right over each expert's rows: [S,a] and [S,b] to [E,a,b]; zero without rows."""
    return grouped_mm(left.mT, right, offs=block.offsets)
