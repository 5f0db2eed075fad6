"""Products of rows sorted by expert with the matrices of their experts, whatever the device.

`torch.nn.functional.grouped_mm` is one call without a wait on a CPU, and for bfloat16 on GPUs of compute
capability 9.x and 10.x. On other GPUs, and for other number formats, it copies the offsets to the host and
loops over the experts (ATen/native/GroupedMMUtils.h). There our own kernel takes its place
(`moe.triton_products`). Which of the two runs depends on the card and the number format alone.

Shapes: S routed rows, E experts; offsets [E] int32, the index after each expert's last row.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm

ALIGNMENT = 16
"""The rows of an operand are a multiple of so many bytes apart; grouped_mm needs this."""
FUSED_CAPABILITIES = (9, 10)
"""Major compute capabilities on which torch's grouped_mm in bfloat16 is one kernel."""


def times(rows: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    """Multiply rows [S,a] with the weights [E,a,b] of their expert: [S,b]."""
    if _torch_waits(rows.device, rows.dtype):
        product: Tensor = _triton_times(rows, weights, offsets)
        return product
    return grouped_mm(rows, weights, offs=offsets)


def outer(left: Tensor, right: Tensor, offsets: Tensor) -> Tensor:
    """Return [E,a,b]: the sum of left' right over each expert's rows of left [S,a] and right [S,b].

    The product of an expert without rows is undefined on some cards, and zero on a CPU.
    """
    if _torch_waits(left.device, left.dtype):
        product: Tensor = _triton_outer(left, right, offsets)
        return product
    return grouped_mm(left.mT, right, offs=offsets)


# Operators, so that torch.compile does not look into them: they choose their tiles by the number of rows.
# Triton is imported where it is used, because only CUDA builds of torch bring it.


@torch.library.custom_op("fedflame::triton_times", mutates_args=())
def _triton_times(rows: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    from fedflame.moe import triton_products

    return triton_products.times(rows, weights, offsets)


@_triton_times.register_fake
def _(rows: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], weights.shape[2])


@torch.library.custom_op("fedflame::triton_outer", mutates_args=())
def _triton_outer(left: Tensor, right: Tensor, offsets: Tensor) -> Tensor:
    from fedflame.moe import triton_products

    return triton_products.outer(left, right, offsets)


@_triton_outer.register_fake
def _(left: Tensor, right: Tensor, offsets: Tensor) -> Tensor:
    return left.new_empty(offsets.shape[0], left.shape[1], right.shape[1])


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _torch_waits(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch's grouped_mm would copy the offsets to the host; decided when a caller is compiled."""
    if device.type != "cuda":
        return False
    major, _ = torch.cuda.get_device_capability(device)
    return dtype != torch.bfloat16 or major not in FUSED_CAPABILITIES
