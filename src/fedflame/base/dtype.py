"""Choose the dtype of the frozen base: the one in which the device multiplies fastest."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from fedflame.base.device import Card, DeviceChoice
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
FIRST_WITH_BFLOAT16 = 8
"""The first major compute capability whose cards multiply in bfloat16."""


@dataclass(frozen=True)
class DtypeChoice:
    """The dtype of the frozen base, by its name in the configuration, and why it was chosen."""

    name: Dtype
    reason: str


def choose_dtype(wanted: Dtype | Literal["auto"], shape: ModelShape, device: DeviceChoice) -> DtypeChoice:
    """Return the wanted dtype; for `auto`, the one in which this device trains these experts fastest.

    A card multiplies fastest in 16 bits, so nothing is measured there. On a CPU, AVX-512 BF16 and AMX make
    large products two to three times faster, but small products slower. So narrow experts use float32 without
    a measurement. For others, the products of one expert are timed, forward and backward.
    """
    if wanted == "float32" and device.cards:
        return DtypeChoice(wanted, "as model.dtype asks; slow, since a card multiplies fastest in 16 bits")
    if wanted != "auto":
        return DtypeChoice(wanted, "as model.dtype asks")
    if device.cards:
        return _of_card(device.cards[0])
    if min(shape.hidden_size, shape.expert_size) < NARROW:
        return DtypeChoice("float32", f"experts below {NARROW} gain nothing from another dtype")
    narrow = _probe(DTYPES, NARROW, NARROW)
    native = [dtype for dtype in DTYPES if narrow[dtype] <= EMULATED * narrow["float32"]]
    seconds = _probe(native, shape.hidden_size, shape.expert_size)
    found = [f"{seconds[dtype] * 1e3:.1f} ms in {dtype}" for dtype in native]
    found += [f"emulated in {dtype}" for dtype in DTYPES if dtype not in native]
    return DtypeChoice(_clearly_fastest(seconds), f"one expert's products: {', '.join(found)}")


def _of_card(card: Card) -> DtypeChoice:
    """Return the 16-bit dtype in which the card multiplies; bfloat16 needs no loss scaling."""
    major, minor = card.capability
    name: Dtype = "bfloat16" if major >= FIRST_WITH_BFLOAT16 else "float16"
    return DtypeChoice(name, f"compute capability {major}.{minor}")


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
