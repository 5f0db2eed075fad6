"""Choose the dtype of the frozen base: the one in which this machine multiplies fastest."""

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
"""In order of preference: a later one must be clearly faster (`CLEAR_GAIN`). float16 needs loss scaling."""
CLEAR_GAIN = 1.5
"""Switch dtype only if it is this many times faster, so that timing noise cannot change a run. Native support
of half precision makes large experts 2 to 3 times faster."""
EMULATED = 4.0
"""If small products (`NARROW`) are this many times slower than in float32, the CPU emulates the dtype. At
full size an emulated dtype is a hundred times slower, too slow to time."""


@dataclass(frozen=True)
class DtypeChoice:
    """The dtype of the frozen base, by its name in the configuration, and why it was chosen."""

    name: Dtype
    reason: str


def choose_dtype(wanted: Dtype | Literal["auto"], shape: ModelShape) -> DtypeChoice:
    """Return the wanted dtype; for `auto`, the one in which this machine trains these experts fastest.

    AVX-512 BF16 and AMX make large products two to three times faster, but small products slower. So narrow
    experts use float32 without a measurement. For others, the products of one expert are timed, forward and
    backward.
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
    """Return the last dtype that is clearly faster than all before it; the first if there is none."""
    names = list(seconds)
    return next(
        name
        for number, name in reversed(list(enumerate(names)))
        if all(seconds[before] >= CLEAR_GAIN * seconds[name] for before in names[:number])
    )


def _probe(dtypes: Sequence[Dtype], hidden_size: int, expert_size: int) -> dict[Dtype, float]:
    """Measure the seconds of one expert's products in each dtype."""
    import torch  # here, because most plans measure nothing and must not wait for torch

    seconds = dict.fromkeys(dtypes, math.inf)
    for _ in range(PROBE_REPEATS):
        for name in dtypes:
            start = time.perf_counter()
            _expert_products(hidden_size, expert_size, getattr(torch, name))
            # The minimum, because other programs can only add time.
            seconds[name] = min(seconds[name], time.perf_counter() - start)
    return seconds


def _expert_products(hidden_size: int, expert_size: int, dtype: torch.dtype) -> None:
    """Compute the gate and up products of one expert with LoRA, and their gradients."""
    import torch

    rows = torch.ones(PROBE_ROWS, hidden_size, dtype=dtype, requires_grad=True)
    base = torch.ones(2 * expert_size, hidden_size, dtype=dtype)
    low = torch.ones(PROBE_RANK, hidden_size, dtype=dtype, requires_grad=True)
    high = torch.ones(2 * expert_size, PROBE_RANK, dtype=dtype, requires_grad=True)
    output = rows @ base.T + (rows @ low.T) @ high.T
    output.backward(torch.ones_like(output))
