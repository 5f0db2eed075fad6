"""Experts with LoRA as one autograd function: base and low-rank products on rows sorted by expert.

Plain autograd would keep every intermediate value of every layer until the backward. This function keeps only
the two rank-R projections and the pre-activation of gate and up; with `recompute` not even the latter. The
backward recomputes the rest, or does not need it: the base is frozen, and the gradient of a routing weight w
follows from the expert's activation a instead of its output. With y = w (W2 a + b2 + c B2 A2 a), g = dL/dy,
c = alpha/r and b2 the bias, where a family has one: dL/dw = a . (W2' g + c A2' B2' g) + b2 . g.

Shapes: N tokens, k active experts, S = N*k routed rows, E experts, H hidden, I expert width, R rank,
n projections before the activation: 2 (gate and up) or 1 (up).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fedflame.moe.routed_rows import Block, RoutedRows

Prepare = Callable[[list[Tensor]], list[Tensor]]
"""Turns slices of the banks A1 [E,nR,H], B1 [E,nI,R], A2 [E,R,I] and B2 [E,H,R] into the matrices that the
rows are multiplied by. R is padded as the products need it. B1 becomes block-diagonal, [E,nI,nR], with its
rows in the order of the frozen weights."""
Gate = Callable[[Tensor], Tensor]
"""The activation of the family, row by row: [S,nI], in the order of the weights, to [S,I]."""

BLOCK_BYTES = 4 * 2**20
"""Target size of a block's temporary values [rows,nI], and of its banks, so that they stay in the cache."""


@dataclass(frozen=True)
class FrozenExperts:
    """The frozen expert weights of an MoE layer, and its activation."""

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
    """`apply(x, weights, A1, B1, A2, B2, prepare, frozen, scaling, rows, recompute)` -> [N,H].

    x is [N,H], the routing weights are [N,k], the banks are float32. `prepare` is called for one block of
    experts at a time, so that no copy of a whole bank is kept for the backward. With `recompute` the backward
    computes the pre-activation again, with the same bits, instead of keeping it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weights: Tensor,
        bank_a1: Tensor,
        bank_b1: Tensor,
        bank_a2: Tensor,
        bank_b2: Tensor,
        prepare: Prepare,
        frozen: FrozenExperts,
        scaling: float,
        rows: RoutedRows,
        recompute: bool,
    ) -> Tensor:
        banks = (bank_a1, bank_b1, bank_a2, bank_b2)
        row_weights = weights.reshape(-1)[rows.order].unsqueeze(1)
        dtype = torch.promote_types(x.dtype, weights.dtype)
        kept, outputs = [], torch.empty(len(rows.order), x.shape[1], dtype=dtype, device=x.device)
        blocks = _blocks(rows, banks, frozen, x.dtype)
        for block in blocks:
            routed, e = x.index_select(0, rows.tokens[block.rows]), block.experts
            a1, b1, a2, b2 = prepare([bank[e].to(x.dtype) for bank in banks])
            wide, thin = block.wide, block.thin
            low1 = thin.scale_(thin.times(thin.take(routed), a1.mT), scaling)
            inner = _pre_activation(routed, low1, b1, frozen, rows, block)
            activation = frozen.gate(inner)
            low2 = thin.scale_(thin.times(thin.take(activation), a2.mT), scaling)
            output = wide.times(activation, frozen.down[e].mT)
            if frozen.down_bias is not None:
                output += rows.spread(frozen.down_bias, block)
            output += thin.give(thin.times(low2, b2.mT))
            torch.mul(output, row_weights[block.rows], out=outputs[block.rows])
            kept += [None if recompute else inner, low1, low2]
        ctx.save_for_backward(x, weights, *banks, *kept)
        ctx.prepare, ctx.frozen, ctx.scaling, ctx.rows, ctx.blocks = prepare, frozen, scaling, rows, blocks
        return rows.sum_per_token(outputs).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weights, *saved = ctx.saved_tensors
        banks, kept = saved[:4], saved[4:]
        frozen, rows, scaling, d_y = ctx.frozen, ctx.rows, ctx.scaling, d_y.contiguous()
        row_weights = weights.reshape(-1)[rows.order].unsqueeze(1).to(x.dtype)
        d_weights = torch.empty(len(rows.order), dtype=torch.float32, device=x.device)
        d_rows = x.new_empty(len(rows.order), x.shape[1]) if ctx.needs_input_grad[0] else None
        d_banks = [
            torch.empty_like(bank) if wanted else None
            for bank, wanted in zip(banks, ctx.needs_input_grad[2:6], strict=True)
        ]
        for number, block in enumerate(ctx.blocks):
            inner, low1, low2 = kept[3 * number : 3 * number + 3]
            tokens, e = rows.tokens[block.rows], block.experts
            w = row_weights[block.rows]
            d_out = d_y.index_select(0, tokens)
            slices = [bank[e].detach().to(x.dtype) for bank in banks]
            for part, d_bank in zip(slices, d_banks, strict=True):
                part.requires_grad_(d_bank is not None)
            wide, thin, routed = block.wide, block.thin, x.index_select(0, tokens)
            with torch.enable_grad():
                prepared = ctx.prepare(slices)
            a1, b1, a2, b2 = (value.detach() for value in prepared)
            if inner is None:
                inner = _pre_activation(routed, low1, b1, frozen, rows, block)
            with torch.enable_grad():
                inner = inner.detach().requires_grad_()
                activation = frozen.gate(inner)
            act = activation.detach()
            thin_d_out = thin.take(d_out)
            d_low2 = thin.scale_(thin.times(thin_d_out, b2), scaling)
            d_activation = wide.times(d_out, frozen.down[e]).add_(thin.give(thin.times(d_low2, a2)))
            d_weights[block.rows] = torch.linalg.vecdot(d_activation.float(), act.float())
            if frozen.down_bias is not None:
                bias = rows.spread(frozen.down_bias, block)
                d_weights[block.rows] += torch.linalg.vecdot(d_out.float(), bias.float())
            (d_inner,) = torch.autograd.grad(activation, inner, d_activation.mul_(w))
            thin_d_inner, thin_w = thin.take(d_inner), thin.take(w)
            d_low1 = thin.scale_(thin.times(thin_d_inner, b1), scaling)
            if d_rows is not None:
                d_routed = wide.times(d_inner, frozen.gate_up[e])
                torch.add(d_routed, thin.give(thin.times(d_low1, a1)), out=d_rows[block.rows])
            factors = (
                (d_low1, thin.take(routed)),
                (thin_d_inner, low1),
                (d_low2.mul_(thin_w), thin.take(act)),
                (thin_d_out, low2.mul(thin_w)),
            )
            for part, value, d_bank, (left, right) in zip(slices, prepared, d_banks, factors, strict=True):
                if d_bank is not None:
                    (d_bank[e],) = torch.autograd.grad(value, part, thin.outer(left, right))
        d_x = None if d_rows is None else rows.sum_per_token(d_rows)
        d_weights = d_weights[rows.positions].to(weights.dtype)
        return d_x, d_weights, *d_banks, None, None, None, None, None


def _pre_activation(
    routed: Tensor, low1: Tensor, b1: Tensor, frozen: FrozenExperts, rows: RoutedRows, block: Block
) -> Tensor:
    """Compute W1 x + b1 + B1 (c A1 x) for a block, [rows,nI]; low1 is c A1 x in the layout of `thin`."""
    inner: Tensor = block.wide.times(routed, frozen.gate_up[block.experts].mT)
    if frozen.gate_up_bias is not None:
        inner += rows.spread(frozen.gate_up_bias, block)
    inner += block.thin.give(block.thin.times(low1, b1.mT))
    return inner


def _blocks(
    rows: RoutedRows, banks: tuple[Tensor, ...], frozen: FrozenExperts, dtype: torch.dtype
) -> list[Block]:
    """Split the experts into blocks that fit the cache. A GPU gets one block, so that it needs no row counts.

    On a CPU a call of a low-rank product in half precision costs more than its arithmetic, so these products
    are padded; in float32 it does not.
    """
    if banks[0].is_cuda:
        return [rows.one_block()]
    bank_bytes = sum(bank[0].numel() for bank in banks) * dtype.itemsize
    row_bytes = frozen.gate_up.shape[1] * dtype.itemsize
    together = max(1, BLOCK_BYTES // row_bytes), max(1, BLOCK_BYTES // bank_bytes)
    return rows.blocks(*together, padded=dtype != torch.float32)
