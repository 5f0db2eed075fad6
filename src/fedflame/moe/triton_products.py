"""Grouped products in Triton, for GPUs on which torch's product is a loop over the experts.

`torch.nn.functional.grouped_mm` has a kernel for bfloat16 on compute capability 9.x and 10.x. Elsewhere,
and for other dtypes, it copies the offsets to the host, waits for them, and starts one product per expert.
`times` and `outer` mean the same, but each tile of the result finds its expert on the device: what the host
does depends on sizes alone. One program adds up each value, in float32 and in a fixed order, so the same
input gives the same bytes. Autograd sees neither function.

Shapes: S rows sorted by expert, E experts, a and b widths. `offsets` [E] is int32: the index after each
expert's last row, S for the last expert. Experts may be empty.

All sizes and strides but S are constants of the kernels: a model has few, and they tell the compiler where it
can read 16 bytes at once. It can where they are multiples of 16 bytes; `grouped_mm` refuses any others.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

THIN, WIDE = 16, 128
"""The least side of a tile, that of tensor cores, and the greatest."""


def times(rows: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    """Multiply rows [S,a] with the weights [E,a,b] of their expert; the result is [S,b].

    The weights may have any strides. The last stride of the rows must be 1; the first may exceed their width.
    """
    _check_unit_stride(rows)
    (count, depth), (experts, _, width) = rows.shape, weights.shape
    product = rows.new_empty(count, width)
    tile = _tile(2 * count // experts, width, rows.dtype)  # twice the mean, since loads are uneven
    tiles = (count // tile["HEIGHT"] + experts) * triton.cdiv(width, tile["WIDTH"])
    with torch.cuda.device_of(rows):  # Triton starts kernels on the current device
        _times_kernel[(tiles,)](
            rows,
            weights,
            offsets,
            product,
            experts,
            depth,
            width,
            rows.stride(0),
            *weights.stride(),
            EXPERTS=triton.next_power_of_2(experts),
            **tile,
        )
    return product


def outer(left: Tensor, right: Tensor, offsets: Tensor) -> Tensor:
    """Return [E,a,b]: the sum of left' right over each expert's rows; zero for an expert without rows.

    The last stride of left [S,a] and of right [S,b] must be 1; the first may exceed the width.
    """
    _check_unit_stride(left, right)
    experts, height, width = len(offsets), left.shape[1], right.shape[1]
    product = left.new_empty(experts, height, width)
    tile = _tile(height, width, left.dtype)
    tiles = experts * triton.cdiv(height, tile["HEIGHT"]) * triton.cdiv(width, tile["WIDTH"])
    with torch.cuda.device_of(left):
        _outer_kernel[(tiles,)](
            left, right, offsets, product, height, width, left.stride(0), right.stride(0), **tile
        )
    return product


def _check_unit_stride(*operands: Tensor) -> None:
    for operand in operands:
        if operand.stride(1) != 1:
            raise ValueError(f"strides {operand.stride()}: the last must be 1; copy a transposed view")


def _tile(height: int, width: int, dtype: torch.dtype) -> dict[str, int]:
    """Choose the tile of a result of about `height` times `width` values per expert, and its launch.

    A thin result has thin tiles. DEPTH is how much of a sum is read at once. The tile fits into registers,
    and what is read ahead into 99 KB: the shared memory of compute capability 8.6, 8.9 and 12.x.
    """
    full = dtype == torch.float32  # twice the bytes, and no tensor cores
    greatest = WIDE // 2 if full else WIDE
    high, wide = (min(max(triton.next_power_of_2(side), THIN), greatest) for side in (height, width))
    warps = 8 if high * wide == WIDE**2 else 4
    return {"HEIGHT": high, "WIDTH": wide, "DEPTH": 32 if full else 64, "num_warps": warps, "num_stages": 3}


@triton.jit
def _times_kernel(
    rows: tl.tensor,
    weights: tl.tensor,
    offsets: tl.tensor,
    product: tl.tensor,
    experts: tl.constexpr,
    depth: tl.constexpr,
    width: tl.constexpr,
    row_stride: tl.constexpr,
    expert_stride: tl.constexpr,
    depth_stride: tl.constexpr,
    width_stride: tl.constexpr,
    EXPERTS: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
) -> None:
    """Compute a tile of `times`: HEIGHT rows of one expert or fewer, WIDTH columns.

    Expert e, with rows from `start` to `end`, has the tiles from start // HEIGHT + e to end // HEIGHT + e.
    These are enough wherever it starts, and the next expert's follow; the last may be left without rows.
    Programs side by side share their rows.
    """
    across = tl.cdiv(width, WIDTH)
    tile = tl.program_id(0) // across
    number = tl.arange(0, EXPERTS)
    ends = tl.load(offsets + number, mask=number < experts, other=0)
    expert = tl.sum(((ends // HEIGHT + number < tile) & (number < experts - 1)).to(tl.int32))
    start = tl.load(offsets + expert - 1, mask=expert > 0, other=0)
    end = tl.load(offsets + expert)
    first = start + (tile - expert - start // HEIGHT) * HEIGHT
    if first >= end:
        return

    row = first + tl.arange(0, HEIGHT)
    column = tl.program_id(0) % across * WIDTH + tl.arange(0, WIDTH)
    deep = tl.arange(0, DEPTH)
    real, within = row[:, None] < end, column[None, :] < width
    row, expert = row.to(tl.int64), expert.to(tl.int64)  # a place can be beyond the range of 32 bits
    left = rows + row[:, None] * row_stride + deep[None, :]
    right = weights + expert * expert_stride + deep[:, None] * depth_stride + column[None, :] * width_stride
    total = tl.zeros((HEIGHT, WIDTH), tl.float32)
    for done in range(0, depth, DEPTH):
        left_part = tl.load(left, mask=real & (deep[None, :] < depth - done), other=0.0)
        right_part = tl.load(right, mask=within & (deep[:, None] < depth - done), other=0.0)
        total = tl.dot(left_part, right_part, total, input_precision="ieee")
        left += DEPTH
        right += DEPTH * depth_stride
    place = product + row[:, None] * width + column[None, :]
    tl.store(place, total.to(product.dtype.element_ty), mask=real & within)


@triton.jit
def _outer_kernel(
    left: tl.tensor,
    right: tl.tensor,
    offsets: tl.tensor,
    product: tl.tensor,
    height: tl.constexpr,
    width: tl.constexpr,
    left_stride: tl.constexpr,
    right_stride: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
) -> None:
    """Compute a tile of `outer`: HEIGHT times WIDTH values of one expert, DEPTH rows at a time."""
    across = tl.cdiv(width, WIDTH)
    tiles = tl.cdiv(height, HEIGHT) * across
    expert, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    start = tl.load(offsets + expert - 1, mask=expert > 0, other=0)
    end = tl.load(offsets + expert)

    line = tile // across * HEIGHT + tl.arange(0, HEIGHT)
    column = tile % across * WIDTH + tl.arange(0, WIDTH)
    deep = tl.arange(0, DEPTH)
    inside, within = line[:, None] < height, column[None, :] < width
    row, expert = (start + deep).to(tl.int64), expert.to(tl.int64)
    left_place = left + row[None, :] * left_stride + line[:, None]
    right_place = right + row[:, None] * right_stride + column[None, :]
    total = tl.zeros((HEIGHT, WIDTH), tl.float32)
    for done in range(start, end, DEPTH):
        left_part = tl.load(left_place, mask=inside & (deep[None, :] < end - done), other=0.0)
        right_part = tl.load(right_place, mask=within & (deep[:, None] < end - done), other=0.0)
        total = tl.dot(left_part, right_part, total, input_precision="ieee")
        left_place += DEPTH * left_stride
        right_place += DEPTH * right_stride
    place = product + expert * height * width + line[:, None] * width + column[None, :]
    tl.store(place, total.to(product.dtype.element_ty), mask=inside & within)
