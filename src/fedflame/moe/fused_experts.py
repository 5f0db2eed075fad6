"""Experts with LoRA as one autograd function, on rows sorted by expert.

Plain autograd would keep every intermediate value of every layer until the backward. This function keeps only
the two rank-R projections and the pre-activation of gate and up; with `recompute` not even the latter. The
backward recomputes the rest, or does not need it: the base is frozen, and the gradient of a routing weight w
follows from the expert's activation a instead of its output. With y = W2 (w a) + w b2 + c B2 A2 (w a), g =
dL/dy, c the scale and b2 the bias, where a family has one: dL/dw = a . (W2' g + c A2' B2' g) + b2 . g.

Shapes: N tokens, k active experts, S = N*k routed rows, E experts, H hidden, I expert width, R rank,
n projections before the activation: 2 (gate and up) or 1 (up).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fedflame.moe.compiled import compiled_on_cuda
from fedflame.moe.expert_dropout import Dropout, draw_masks
from fedflame.moe.projection import Projection
from fedflame.moe.routed_rows import EVERYTHING, Block, RoutedRows
from fedflame.moe.row_norms import RowNorms
from fedflame.moe.row_passes import Gate, gate_backward, gathered, sum_per_token, to_gather, weighted_gate

BLOCK_BYTES = 4 * 2**20
"""Target size of a block's temporary values [rows,nI] on a CPU, so that they stay in the cache."""


@dataclass(frozen=True)
class Experts:
    """What the rows of one MoE layer are multiplied by."""

    up: Projection
    """Gate and up, or up alone."""
    down: Projection
    gate: Gate

    @property
    def count(self) -> int:
        return len(self.up.weight)

    def of(self, experts: slice) -> Experts:
        """Return these experts only, as views."""
        if experts == EVERYTHING:
            return self
        return Experts(self.up.of(experts), self.down.of(experts), self.gate)


class FusedExperts(torch.autograd.Function):
    """`apply(x, weights, A1, B1, A2, B2, index, experts, recompute, p, norms)` -> [N,H], and rows [E].

    x is [N,H], the routing weights and the experts' numbers `index` are [N,k]. The banks A1 [E,nR,H],
    B1 [E,nI,R], A2 [E,R,I] and B2 [E,H,R] are float32; `experts` holds their values already. With `recompute`
    the backward computes the pre-activation again, with the same bits, instead of keeping it. p is the chance
    that an input of an A is dropped; gate and up see the same inputs. With `norms` the backward gives no
    gradient of a bank, but leaves it to them.
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
        index: Tensor,
        experts: Experts,
        recompute: bool,
        p: float,
        norms: RowNorms | None,
    ) -> tuple[Tensor, Tensor]:
        masks = draw_masks(index.numel(), (experts.up.into, experts.down.into), p, x.device)
        factor = 1 / (1 - p)
        output, rows, kept = _forward(x, weights, index, masks, experts, factor, recompute)
        ctx.save_for_backward(x, weights, *rows, *masks, *kept)
        ctx.experts, ctx.rank, ctx.masks, ctx.factor = experts, bank_b2.shape[2], len(masks), factor
        ctx.norms, ctx.banks = norms, (bank_a1, bank_b1, bank_a2, bank_b2)
        ctx.mark_non_differentiable(per_expert := rows.per_expert)
        return output, per_expert

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        x, weights, *saved = ctx.saved_tensors
        rows, masks, kept = RoutedRows(*saved[:4]), saved[4 : 4 + ctx.masks], saved[4 + ctx.masks :]
        needs_x, _, *needs_banks = ctx.needs_input_grad[:6]
        rest = rows, masks, kept, ctx.experts, ctx.factor, ctx.rank
        norms: RowNorms | None = ctx.norms
        if norms is None:
            found = _backward(d_y, x, weights, *rest, needs_x, needs_banks, None)
        else:  # how many groups there are is known only then: not compiled
            found = _uncompiled_backward(d_y, x, weights, *rest, needs_x, needs_banks, norms)
            given = x.detach(), weights.detach(), *rest  # the graph is not kept, nor what it holds
            row_of_token = norms.row_of_token

            def scaled(factors: Tensor) -> Sequence[Tensor | None]:
                by_token = factors.to(d_y.dtype)[row_of_token].unsqueeze(1)
                return _backward(d_y * by_token, *given, False, needs_banks, None)[2:]

            norms.keep(ctx.banks, scaled)
        return *found, None, None, None, None, None


@compiled_on_cuda(varying=4)
def _forward(
    x: Tensor,
    weights: Tensor,
    index: Tensor,
    masks: Sequence[Tensor],
    experts: Experts,
    factor: float,
    recompute: bool,
) -> tuple[Tensor, RoutedRows, list[Tensor | None]]:
    """Return the output [N,H], the order of the rows, and for each block what the backward needs."""
    rows = RoutedRows.sort(index, experts.count)
    wide_x, row_weights = to_gather(x, experts.up.constant), _by_row(weights, rows)
    kept, outputs = [], _Collected(len(rows.order))
    for block in _blocks(rows, experts.up):
        up, down = (one := experts.of(block.experts)).up, one.down
        of_up, of_down = _dropouts(masks, factor, block)
        routed = gathered(wide_x, rows.tokens[block.rows], up.constant)
        low1 = up.project(routed, block.offsets, of_up)
        inner = up.times(routed, block.offsets)
        gated = weighted_gate(one.gate, inner, row_weights[block.rows], down.constant)
        low2 = down.project(gated, block.offsets, of_down)
        outputs.put(block.rows, down.times(gated, block.offsets))
        kept += [None if recompute else inner, low1, low2]
    return sum_per_token(outputs.whole, rows.positions), rows, kept


def _uncompiled_backward(
    d_y: Tensor,
    x: Tensor,
    weights: Tensor,
    rows: RoutedRows,
    masks: Sequence[Tensor],
    kept: Sequence[Tensor | None],
    experts: Experts,
    factor: float,
    rank: int,
    needs_x: bool,
    needs_banks: Sequence[bool],
    norms: RowNorms | None,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, of the routing weights, and of those banks that need one.

    With `norms`, the banks' part in the norms of the batch's rows is added to these instead.
    """
    wide_x, row_weights = to_gather(x, experts.up.constant), _by_row(weights, rows)
    no_bias = torch.zeros_like(experts.down.constant)
    wide_d_y = to_gather(d_y, no_bias)
    d_rows, d_weights = _Collected(len(rows.order)), _Collected(len(rows.order))
    d_banks = [_Collected(experts.count) for _ in needs_banks]
    for number, block in enumerate(_blocks(rows, experts.up)):
        inner, low1, low2 = kept[3 * number : 3 * number + 3]
        assert low1 is not None and low2 is not None
        up, down = (one := experts.of(block.experts)).up, one.down
        of_up, of_down = _dropouts(masks, factor, block)
        tokens, offsets = rows.tokens[block.rows], block.offsets
        routed, d_out = gathered(wide_x, tokens, up.constant), gathered(wide_d_y, tokens, no_bias)
        if inner is None:
            up.tail(routed).copy_(low1)
            inner = up.times(routed, offsets)
        down.project_back(d_out, offsets)
        gated, d_inner, d_row_weights = gate_backward(
            one.gate,
            inner,
            down.times_back(d_out, offsets, of_down),
            row_weights[block.rows],
            len(up.constant),
        )
        if down.has_bias:
            d_row_weights += d_out[:, down.out + down.low]
        d_weights.put(block.rows, d_row_weights)
        up.project_back(d_inner, offsets)
        if needs_x:
            d_rows.put(block.rows, up.times_back(d_inner, offsets, of_up))
        gradients = (
            partial(up.gradient_of_a, d_inner, routed, dropout=of_up),
            partial(up.gradient_of_b, d_inner, low1),
            partial(down.gradient_of_a, d_out, gated, dropout=of_down),
            partial(down.gradient_of_b, d_out, low2),
        )
        groups = None if norms is None else norms.groups(rows, block)
        for wanted, d_bank, gradient in zip(needs_banks, d_banks, gradients, strict=True):
            if not wanted:
                continue
            if norms is None or groups is None:
                d_bank.put(block.experts, gradient(offsets, rank))
            else:
                norms.add(gradient(groups.offsets, rank), groups.rows)
    return (
        sum_per_token(d_rows.whole, rows.positions) if needs_x else None,
        d_weights.whole[rows.positions].to(weights.dtype),
        *(
            d_bank.whole if wanted and norms is None else None
            for wanted, d_bank in zip(needs_banks, d_banks, strict=True)
        ),
    )


_backward = compiled_on_cuda(varying=6)(_uncompiled_backward)


def _dropouts(masks: Sequence[Tensor], factor: float, block: Block) -> tuple[Dropout | None, Dropout | None]:
    """Return the dropout of the block's rows on the inputs of A1 and A2."""
    if not masks:
        return None, None
    of_up, of_down = (Dropout(mask[block.rows], factor) for mask in masks)
    return of_up, of_down


class _Collected:
    """Values of all blocks in order; those of a single block are not copied."""

    def __init__(self, count: int) -> None:
        self._count = count
        self.whole = torch.empty(0)

    def put(self, at: slice, values: Tensor) -> None:
        if len(values) == self._count:
            self.whole = values
            return
        if len(self.whole) != self._count:
            self.whole = values.new_empty(self._count, *values.shape[1:])
        self.whole[at] = values


def _by_row(weights: Tensor, rows: RoutedRows) -> Tensor:
    """Return the routing weights [N,k] in the order of the rows, [S,1]."""
    return weights.reshape(-1).index_select(0, rows.order).unsqueeze(1)


def _blocks(rows: RoutedRows, up: Projection) -> list[Block]:
    """Split the experts into blocks that fit a CPU's cache; on a GPU they are one: no wait."""
    if up.weight.device.type != "cpu":
        return [rows.one_block()]
    bank_bytes = up.a[0].nbytes + up.b[0].nbytes
    row_bytes = up.out * up.weight.itemsize
    return rows.blocks(max(1, BLOCK_BYTES // row_bytes), max(1, BLOCK_BYTES // bank_bytes))
