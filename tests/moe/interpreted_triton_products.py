"""The products of `fedflame.moe.triton_products` by Triton's interpreter, against a loop in float64.

`test_triton_products.py` runs this file in a process of its own with TRITON_INTERPRET=1, which Triton reads
when it is imported.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

from fedflame.moe.triton_products import outer, times

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LOADS = {
    "empty experts": (0, 37, 1, 0, 0, 150, 16, 0),
    "tall tiles": (200, 0, 130),
    "rows of a tile": (128, 128),
    "one expert": (5,),
    "one row": (0, 0, 1),
    "no rows": (0, 0, 0),
}


@pytest.fixture(autouse=True, scope="module")
def _exact_interpreter() -> Iterator[None]:
    """Widen bfloat16, whose bits the interpreter multiplies as integers. Let it copy no operand back.

    That would copy each storage onto itself, and so touch all of its memory.
    """
    multiply = interpreter.InterpreterBuilder.create_dot

    def widened(operand: Any) -> Any:
        if operand.dtype.scalar != tl.bfloat16:
            return operand
        return interpreter.TensorHandle((operand.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(builder: Any, left: Any, right: Any, *options: Any) -> Any:
        return multiply(builder, widened(left), widened(right), *options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
        patch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *_: None)
        yield


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """Let new memory be NaN, as torch makes it where algorithms must be deterministic."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(0).new_empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def drawn(*shape: int, dtype: torch.dtype, margin: int = 0) -> Tensor:
    """Return random values: a view of a buffer with `margin` of NaN around each dimension but the first."""
    wider = [shape[0], *(size + 2 * margin for size in shape[1:])]
    inner = (slice(None), *(slice(margin, margin + size) for size in shape[1:]))
    values = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))
    return torch.full(wider, torch.nan, dtype=dtype)[inner].copy_(values)


def offsets_of(loads: tuple[int, ...]) -> Tensor:
    return torch.tensor(loads).cumsum(0).to(torch.int32)


def slow_times(rows: Tensor, weights: Tensor, loads: tuple[int, ...]) -> Tensor:
    parts = zip(rows.double().split(loads), weights.double(), strict=True)
    return torch.cat([part @ matrix for part, matrix in parts])


def slow_outer(left: Tensor, right: Tensor, loads: tuple[int, ...]) -> Tensor:
    parts = zip(left.double().split(loads), right.double().split(loads), strict=True)
    return torch.stack([a.T @ b for a, b in parts])


def assert_rounded_once(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Allow the rounding of the result, cut off by the interpreter in bfloat16, and of sums in float32."""
    assert found.dtype == dtype
    rounding = torch.finfo(dtype).eps / (1 if dtype == torch.bfloat16 else 2)
    torch.testing.assert_close(found.double(), expected, rtol=rounding, atol=3e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("loads", LOADS.values(), ids=LOADS)
def test_times(loads: tuple[int, ...], dtype: torch.dtype) -> None:
    rows = drawn(sum(loads), 72, dtype=dtype)
    weights = drawn(len(loads), 72, 24, dtype=dtype)
    found = times(rows, weights, offsets_of(loads))
    assert_rounded_once(found, slow_times(rows, weights, loads), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("loads", LOADS.values(), ids=LOADS)
def test_outer(loads: tuple[int, ...], dtype: torch.dtype) -> None:
    left, right = drawn(sum(loads), 72, dtype=dtype), drawn(sum(loads), 24, dtype=dtype)
    found = outer(left, right, offsets_of(loads))
    assert_rounded_once(found, slow_outer(left, right, loads), dtype)
    assert not found[[load == 0 for load in loads]].any()


UNEVEN = (0, 70, 3, 0, 20)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("a", "b"), [(40, 8), (8, 16), (1, 37), (135, 64), (50, 150), (64, 1)])
def test_views_of_wider_buffers_in_sizes_that_fill_no_tile(a: int, b: int, dtype: torch.dtype) -> None:
    offsets = offsets_of(UNEVEN)
    rows = drawn(sum(UNEVEN), a, dtype=dtype, margin=3)
    others = drawn(sum(UNEVEN), b, dtype=dtype, margin=5)
    weights = drawn(len(UNEVEN), a, b, dtype=dtype, margin=2)
    turned = drawn(len(UNEVEN), b, a, dtype=dtype, margin=4).mT
    for matrices in (weights, turned):
        assert_rounded_once(times(rows, matrices, offsets), slow_times(rows, matrices, UNEVEN), dtype)
    assert_rounded_once(outer(rows, others, offsets), slow_outer(rows, others, UNEVEN), dtype)


@pytest.mark.parametrize("seed", range(4))
def test_tiles_find_their_expert_whatever_the_loads_are(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    experts = int(torch.randint(1, 12, (), generator=generator))
    chosen = torch.randint(experts, (400,), generator=generator) ** 2 // experts  # the first experts get most
    loads = tuple(chosen.bincount(minlength=experts).tolist())
    rows, weights = drawn(400, 3, dtype=torch.float32), drawn(experts, 3, 2, dtype=torch.float32)
    found = times(rows, weights, offsets_of(loads))
    assert_rounded_once(found, slow_times(rows, weights, loads), torch.float32)


def test_places_beyond_the_range_of_32_bits() -> None:
    far, loads = 2**30, (1, 1, 1)  # so the last row and the last matrix lie 2**31 values from the first
    memory = torch.from_numpy(np.empty(2 * far + 16 + 16 * 8, np.float16))  # only what is touched is used
    rows = memory.as_strided((3, 16), (far, 1)).copy_(drawn(3, 16, dtype=torch.float16))
    weights = memory.as_strided((3, 16, 8), (far, 1, 16), 16).copy_(drawn(3, 16, 8, dtype=torch.float16))
    near, offsets = drawn(3, 24, dtype=torch.float16), offsets_of(loads)
    assert_rounded_once(times(rows, weights, offsets), slow_times(rows, weights, loads), torch.float16)
    assert_rounded_once(outer(rows, near, offsets), slow_outer(rows, near, loads), torch.float16)
    assert_rounded_once(outer(near, rows, offsets), slow_outer(near, rows, loads), torch.float16)
