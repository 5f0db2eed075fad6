"""One projection of all experts, base and LoRA, in the form that rows are multiplied by.

A row x carries A x in its tail, behind the width of x. Then W x + c B A x is one product with [W, c B], and
the gradient W' g + A' (c B' g) is one product with [W; A], where c is the scale: no pass over [S,out] adds
the low-rank part, and the sum is rounded once. For this, W, c B and A lie in one buffer [E, out+n, in+n]: W
upper left, c B to its right, A below it. The base's own parameter becomes a view of the buffer, so that its
weights exist once.

Weights that are mapped from files stay where they are: a buffer would bring them into memory. Base and LoRA
are then two products.

A bias is one more column beside c B, where each row has a one. In the backward g . bias comes out at the same
place.

Shapes: S rows sorted by expert, E experts, R rank. The tail has n = `room` columns: `filled` of them for each
of the projections side by side (gate and up are two), which is R and zeros up to a multiple of 16 bytes, as
the products need.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedflame.moe.expert_dropout import Dropout
from fedflame.moe.expert_products import ALIGNMENT, outer, times


@dataclass(frozen=True)
class Projection:
    """One projection of all experts; see the module, and `joined` and `apart`, which make one."""

    weight: Tensor
    """W [E,out,in]."""
    a: Tensor
    """[E,n,in]: A of every part, and zeros."""
    b: Tensor
    """[E,out,n]: c B of every part, block-diagonal, then the bias and zeros."""
    buffer: Tensor | None
    """[E,out+n,in+n], of which the three are views; None if they are apart."""
    parts: Sequence[slice]
    """For each of the projections side by side, its rows of W."""
    filled: int
    """Columns of each part."""
    constant: Tensor
    """[n]: one in the column of the bias, otherwise zeros."""
    scaling: float
    """c, alpha/r or, with rsLoRA, alpha/sqrt(r)."""

    @property
    def out(self) -> int:
        return self.weight.shape[1]

    @property
    def into(self) -> int:
        return self.weight.shape[2]

    @property
    def low(self) -> int:
        """Columns of all parts."""
        return len(self.parts) * self.filled

    @property
    def has_bias(self) -> bool:
        return len(self.constant) > self.low

    def of(self, experts: slice) -> Projection:
        """Return the same projection of these experts only, as views."""
        buffer = None if self.buffer is None else self.buffer[experts]
        return replace(self, weight=self.weight[experts], a=self.a[experts], b=self.b[experts], buffer=buffer)

    def tail(self, rows: Tensor) -> Tensor:
        """Return the view [S,low] of rows [S,in+n] that holds A x."""
        return rows[:, self.into : self.into + self.low]

    def write(self, a: Tensor, b: Tensor) -> None:
        """Bring the banks A [E,nR,in] and c times B [E,out,R], parts in order, into the products."""
        rank = b.shape[2]
        if rank < self.filled:  # a client of a larger rank may have been here
            self.a[:, : self.low].zero_()
            self.b[:, :, : self.low].zero_()
        a_parts, b_parts = a.split(rank, 1), b.chunk(len(self.parts), 1)
        for part, rows in enumerate(self.parts):
            at = self._columns(part, rank)
            self.a[:, at].copy_(a_parts[part])
            torch.mul(b_parts[part], self.scaling, out=self.b[:, rows, at])

    def gradient_of_a(
        self, d_rows: Tensor, rows: Tensor, offsets: Tensor, rank: int, dropout: Dropout | None = None
    ) -> Tensor:
        """Return the gradient of the bank A [E,nR,in] in float32; d_rows [S,out+n] and rows [S,in+n]."""
        inputs = rows[:, : self.into] if dropout is None else dropout(rows[:, : self.into])
        whole = outer(d_rows[:, self.out : self.out + self.low], inputs, offsets)
        by_part: Tensor = whole.unflatten(1, (-1, self.filled))
        return by_part[:, :, :rank].flatten(1, 2).float()

    def gradient_of_b(self, d_rows: Tensor, low: Tensor, offsets: Tensor, rank: int) -> Tensor:
        """Return the gradient of the bank B [E,out,R] in float32; d_rows [S,out+n] and low = A x [S,low]."""
        whole = outer(d_rows[:, : self.out], low, offsets)
        parts = [whole[:, rows, self._columns(part, rank)] for part, rows in enumerate(self.parts)]
        return (parts[0] if len(parts) == 1 else torch.cat(parts, 1)).float().mul_(self.scaling)

    def _columns(self, part: int, rank: int) -> slice:
        return slice(part * self.filled, part * self.filled + rank)

    def project(self, rows: Tensor, offsets: Tensor, dropout: Dropout | None = None) -> Tensor:
        """Return A x, [S,low], and put it into the tail of rows [S,in+n]; the columns after it stay.

        With dropout A sees what is left of x, and W the whole of it.
        """
        a = self.a[:, : self.low].mT
        if dropout is None:
            return project_into(rows, a, offsets)
        low = times(dropout(rows[:, : self.into]), a, offsets)
        self.tail(rows).copy_(low)
        return low

    def times(self, rows: Tensor, offsets: Tensor) -> Tensor:
        """Compute W x + c B A x + bias, [S,out], from rows [S,in+n] with their tail."""
        if self.buffer is not None:
            return times(rows, self.buffer[:, : self.out].mT, offsets)
        base = times(rows[:, : self.into], self.weight.mT, offsets)
        return base.add_(times(rows[:, self.into :], self.b.mT, offsets))

    def project_back(self, d_rows: Tensor, offsets: Tensor) -> Tensor:
        """Return c B' g and g . bias, [S,n], and put it into the tail of d_rows [S,out+n], which hold g."""
        return project_into(d_rows, self.b, offsets)

    def times_back(self, d_rows: Tensor, offsets: Tensor, dropout: Dropout | None = None) -> Tensor:
        """Compute W' g + A' (c B' g), [S,in], from d_rows [S,out+n] with their tail.

        Dropout applies to the second part alone, so that the two are no longer one product.
        """
        if self.buffer is not None and dropout is None:
            return times(d_rows, self.buffer[:, :, : self.into], offsets)
        base = times(d_rows[:, : self.out], self.weight, offsets)
        low_rank = times(d_rows[:, self.out :], self.a, offsets)
        return base.add_(low_rank if dropout is None else dropout(low_rank))


def project_into(rows: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    """Multiply the first columns of rows [S,a+n] with weights [E,a,b], and put the product behind them."""
    if torch.compiler.is_compiling():
        product: Tensor = _operator(rows, weights, offsets)
        return product
    return _project_into(rows, weights, offsets)


def _project_into(rows: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    into, low = weights.shape[1:]
    product = times(rows[:, :into], weights, offsets)
    rows[:, into : into + low] = product
    return product


_operator = torch.library.custom_op("fedflame::project_into", _project_into, mutates_args={"rows"})
"""torch.compile would copy all rows to change their last columns; it does not look into an operator."""


@_operator.register_fake
def _(rows: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], weights.shape[2])


def joined(
    weight: Tensor, bias: Tensor | None, parts: Sequence[slice], rank: int, scaling: float
) -> Projection:
    """Copy the weights [E,out,in] and their bias [E,out] into one buffer with room for LoRA of this rank."""
    filled, room = _sizes(weight, bias, len(parts), rank)
    experts, out, into = weight.shape
    buffer = weight.new_zeros(experts, out + room, into + room)
    buffer[:, :out, :into] = weight
    views = buffer[:, :out, :into], buffer[:, out:, :into], buffer[:, :out, into:]
    return Projection(*views, buffer, parts, filled, _with_bias(views[2], bias, len(parts) * filled), scaling)


def apart(
    weight: Tensor, bias: Tensor | None, parts: Sequence[slice], rank: int, scaling: float
) -> Projection:
    """Leave the weights [E,out,in] where they are, and make room for LoRA of this rank beside them."""
    filled, room = _sizes(weight, bias, len(parts), rank)
    experts, out, into = weight.shape
    a, b = weight.new_zeros(experts, room, into), weight.new_zeros(experts, out, room)
    return Projection(weight, a, b, None, parts, filled, _with_bias(b, bias, len(parts) * filled), scaling)


def _sizes(weight: Tensor, bias: Tensor | None, parts: int, rank: int) -> tuple[int, int]:
    """Return `filled` and the number of columns of the tail."""
    multiple = ALIGNMENT // weight.itemsize
    filled = rank + -rank % multiple
    return filled, parts * filled + (0 if bias is None else multiple)


def _with_bias(b: Tensor, bias: Tensor | None, column: int) -> Tensor:
    """Put the bias into this column of `b`; return `constant`."""
    constant = b.new_zeros(b.shape[2])
    if bias is not None:
        b[:, :, column] = bias
        constant[column] = 1
    return constant
