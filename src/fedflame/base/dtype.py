"""The number format of the frozen base: the one that this machine multiplies in fastest."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from fedflame.config.words import Dtype
from fedflame.cost.model_shape import ModelShape

if TYPE_CHECKING:
    import torch

PROBE_ROWS, PROBE_RANK, PROBE_REPEATS = 64, 8, 15
NARROW = 256
DTYPES: tuple[Dtype, ...] = ("float32", "bfloat16", "float16")
"""Each is taken only where it is clearly faster than all before it: float16 needs loss scaling."""
CLEAR_GAIN = 1.5
"""So many times faster: native support of a half precision gives 2 to 3 on large experts, so that
noise on a busy machine does not change the answer, nor the bytes of a run."""
EMULATED = 4.0
"""Where even `NARROW` products are so many times slower than in float32 the CPU emulates the dtype;
at full size that is a hundred times, too slow to time."""


@dataclass(frozen=True)
class DtypeChoice:
    """The dtype of the frozen base, under its name in the configuration, and why this one."""

    name: Dtype
    reason: str


def choose_dtype(wanted: Dtype | Literal["auto"], shape: ModelShape) -> DtypeChoice:
    """The wanted dtype; for `auto` that in which this machine trains experts of this shape fastest.

    AVX-512 BF16 and AMX make large products two to three times faster; the thin ones of a small model
    run slower, so narrow experts stay in float32 unasked. Others are timed: one expert's products,
    forward and backward.
    """
    if wanted != "auto":
        return DtypeChoice(wanted, "as model.dtype asks")
    if min(shape.hidden_size, shape.expert_size) < NARROW:
        return DtypeChoice("float32", f"experts below {NARROW} gain nothing from another dtype")
    narrow = _probe(DTYPES, NARROW, NARROW)
    native = [dtype for dtype in DTYPES if narrow[dtype] <= EMULATED * narrow["float32"]]
    seconds = _probe(native, shape.hidden_size, shape.expert_size)
    found = [f"{seconds[dtype] * 1e3:.1f} ms in {dtype}" for dtype in native]
    found += [f"emulated in {dtype}" for dtype in DTYPES if dtype not in native]
    return DtypeChoice(_clearly_fastest(seconds), f"one expert's products: {', '.join(found)}")


def _clearly_fastest(seconds: dict[Dtype, float]) -> Dtype:
    """The last one that is clearly faster than all before it; the first if there is none."""
    names = list(seconds)
    return next(
        name
        for number, name in reversed(list(enumerate(names)))
        if all(seconds[before] >= CLEAR_GAIN * seconds[name] for before in names[:number])
    )


def _probe(dtypes: Sequence[Dtype], hidden_size: int, expert_size: int) -> dict[Dtype, float]:
    """Seconds of one expert's products in each dtype."""
    import torch  # here: most plans probe nothing, and must not wait for it

    seconds = dict.fromkeys(dtypes, math.inf)
    for _ in range(PROBE_REPEATS):
        for name in dtypes:
            start = time.perf_counter()
            _expert_products(hidden_size, expert_size, getattr(torch, name))
            # The least of several, since another program can only add time.
            seconds[name] = min(seconds[name], time.perf_counter() - start)
    return seconds


def _expert_products(hidden_size: int, expert_size: int, dtype: torch.dtype) -> None:
    """The gate and up products of one expert with LoRA, and their gradients."""
    import torch

    rows = torch.ones(PROBE_ROWS, hidden_size, dtype=dtype, requires_grad=True)
    base = torch.ones(2 * expert_size, hidden_size, dtype=dtype)
    low = torch.ones(PROBE_RANK, hidden_size, dtype=dtype, requires_grad=True)
    high = torch.ones(2 * expert_size, PROBE_RANK, dtype=dtype, requires_grad=True)
    output = rows @ base.T + (rows @ low.T) @ high.T
    output.backward(torch.ones_like(output))
