"""One projection of all experts against the formula, expert by expert, joined in a buffer and apart."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fedflame.moe.projection import Projection, apart, joined

EXPERTS, OUT, INTO, SCALING = 3, 12, 20, 1.5
COUNTS = [3, 0, 4]
OFFSETS = torch.tensor([3, 3, 7], dtype=torch.int32)
OWNER = [0, 0, 0, 2, 2, 2, 2]
PARTS = {
    "one": [slice(None)],
    "gate before up": [slice(0, 6), slice(6, None)],
    "gate and up in turn": [slice(0, None, 2), slice(1, None, 2)],
}
places = pytest.mark.parametrize("place", [joined, apart])
orders = pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS.keys())


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


WEIGHT, BIAS = draw(EXPERTS, OUT, INTO, seed=1), draw(EXPERTS, OUT, seed=2)


def banks(parts: list[slice], rank: int) -> tuple[Tensor, Tensor]:
    return draw(EXPERTS, len(parts) * rank, INTO, seed=3), draw(EXPERTS, OUT, rank, seed=4)


def product(parts: list[slice], a: Tensor, b: Tensor, expert: int) -> Tensor:
    """c B A of an expert, [out,in], in the order of the weight's rows."""
    whole, rank = torch.zeros(OUT, INTO), b.shape[2]
    height = OUT // len(parts)
    for part, rows in enumerate(parts):
        of_part = b[expert, part * height : (part + 1) * height] @ a[expert, part * rank : (part + 1) * rank]
        whole[rows] = SCALING * of_part
    return whole


def rows_with_tail(projection: Projection, x: Tensor) -> Tensor:
    return torch.cat([x, projection.constant.expand(len(x), -1)], 1)


@places
@orders
@pytest.mark.parametrize("bias", [None, BIAS], ids=["no bias", "bias"])
@pytest.mark.parametrize("rank", [1, 3, 4, 6])
def test_products_and_gradients_are_those_of_the_formula(
    place: Callable[..., Projection], parts: list[slice], bias: Tensor | None, rank: int
) -> None:
    projection, (a, b) = place(WEIGHT, bias, parts, 6, SCALING), banks(parts, rank)
    projection.write(*banks(parts, 6))  # what a client of a larger rank has left must be gone
    projection.write(a, b)
    x, d_y = draw(sum(COUNTS), INTO, seed=5), draw(sum(COUNTS), OUT, seed=6)
    rows = rows_with_tail(projection, x)
    projection.project(rows, OFFSETS)
    d_rows = torch.cat([d_y, torch.full((len(x), len(projection.constant)), torch.nan)], 1)
    projection.project_back(d_rows, OFFSETS)
    for number, expert in enumerate(OWNER):
        full = WEIGHT[expert] + product(parts, a, b, expert)
        expected = full @ x[number] + (0 if bias is None else bias[expert])
        assert_near(projection.times(rows, OFFSETS)[number], expected)
        assert_near(projection.times_back(d_rows, OFFSETS)[number], full.T @ d_y[number])
        if bias is not None:
            assert_near(d_rows[number, OUT + projection.low], bias[expert] @ d_y[number])
    leaves = [bank.clone().requires_grad_() for bank in (a, b)]
    outputs = [(product(parts, *leaves, expert) @ x[n]) @ d_y[n] for n, expert in enumerate(OWNER)]
    wanted = torch.autograd.grad(torch.stack(outputs).sum(), leaves)
    low = projection.tail(rows)
    assert_near(projection.gradient_of_a(d_rows, rows, OFFSETS, rank), wanted[0])
    assert_near(projection.gradient_of_b(d_rows, low, OFFSETS, rank), wanted[1])


def assert_near(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@places
def test_some_experts_are_views_of_all(place: Callable[..., Projection]) -> None:
    projection = place(WEIGHT, BIAS, PARTS["one"], 4, SCALING)
    some = projection.of(slice(1, 3))
    projection.write(*banks(PARTS["one"], 4))
    x = rows_with_tail(projection, draw(5, INTO, seed=5))
    offsets = torch.tensor([0, 2, 5], dtype=torch.int32)
    for one, ends in ((projection, offsets), (some, offsets[1:])):
        one.project(x, ends)
    assert torch.equal(projection.times(x, offsets), some.times(x, offsets[1:]))


def test_joined_weights_exist_once_and_weights_apart_stay_where_they_are() -> None:
    held = joined(WEIGHT, None, PARTS["one"], 4, SCALING)
    assert held.buffer is not None
    assert {view.untyped_storage().data_ptr() for view in (held.weight, held.a, held.b)} == {
        held.buffer.untyped_storage().data_ptr()
    }
    assert torch.equal(held.weight, WEIGHT)
    assert apart(WEIGHT, None, PARTS["one"], 4, SCALING).weight is WEIGHT


@pytest.mark.parametrize(("dtype", "filled"), [(torch.float32, 8), (torch.bfloat16, 8)])
def test_ranks_are_filled_up_to_sixteen_bytes(dtype: torch.dtype, filled: int) -> None:
    projection = joined(WEIGHT.to(dtype), None, PARTS["gate before up"], 5, SCALING)
    assert projection.filled == filled and projection.low == 2 * filled
    assert projection.buffer is not None and projection.buffer.shape == (EXPERTS, OUT + 16, INTO + 16)
