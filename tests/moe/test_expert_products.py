"""Grouped products against a plain loop over the experts, and which of the two kernels runs where."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedflame.moe import expert_products
from fedflame.moe.expert_products import outer, times

INNER, OUTER = 8, 12

per_expert = st.lists(st.integers(0, 5), min_size=1, max_size=6)


def numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def offsets(counts: list[int]) -> Tensor:
    return torch.tensor(counts).cumsum(0, dtype=torch.int32)


@given(counts=per_expert)
def test_each_row_meets_the_weights_of_its_expert(counts: list[int]) -> None:
    rows, weights = numbers(sum(counts), INNER, seed=0), numbers(len(counts), INNER, OUTER, seed=1)
    expected = [own @ weight for own, weight in zip(rows.split(counts), weights, strict=True)]
    torch.testing.assert_close(times(rows, weights, offsets(counts)), torch.cat(expected))


@given(counts=per_expert)
def test_outer_products_are_sums_over_the_experts_own_rows(counts: list[int]) -> None:
    left, right = numbers(sum(counts), INNER, seed=0), numbers(sum(counts), OUTER, seed=1)
    pairs = zip(left.split(counts), right.split(counts), strict=True)
    torch.testing.assert_close(outer(left, right, offsets(counts)), torch.stack([a.T @ b for a, b in pairs]))


@pytest.mark.parametrize(
    ("capability", "dtype", "ours"),
    [
        ((8, 0), torch.bfloat16, True),
        ((8, 9), torch.bfloat16, True),
        ((9, 0), torch.bfloat16, False),
        ((10, 3), torch.bfloat16, False),
        ((12, 0), torch.bfloat16, True),
        ((9, 0), torch.float16, True),
        ((9, 0), torch.float32, True),
    ],
)
def test_torchs_kernel_runs_where_it_is_one_kernel_and_ours_elsewhere(
    capability: tuple[int, int], dtype: torch.dtype, ours: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The card is asked, nothing is tried."""
    card = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert expert_products._torch_waits(card, dtype) == ours
    assert not expert_products._torch_waits(torch.device("cpu"), dtype)


def test_where_torch_would_wait_our_kernel_gets_the_operands(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[object, ...]] = []
    kernel = ModuleType("triton_products")
    kernel.times = lambda *operands: seen.append(("times", *operands))  # type: ignore[attr-defined]
    kernel.outer = lambda *operands: seen.append(("outer", *operands))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fedflame.moe.triton_products", kernel)
    monkeypatch.setattr("fedflame.moe.triton_products", kernel, raising=False)
    monkeypatch.setattr(expert_products, "_torch_waits", lambda device, dtype: True)
    rows, weights, ends = numbers(2, INNER, seed=0), numbers(1, INNER, OUTER, seed=1), offsets([2])
    times(rows, weights, ends)
    outer(rows, rows, ends)
    assert seen == [("times", rows, weights, ends), ("outer", rows, rows, ends)]
