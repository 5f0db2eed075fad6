from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as draw
from torch import Tensor

from fedflame.privacy.clipping import add_clipped


def sums() -> dict[str, Tensor]:
    return {"A": torch.zeros(2, 3), "s": torch.zeros(())}


def test_a_long_gradient_is_scaled_by_the_norm_of_all_values_together() -> None:
    found = sums()
    add_clipped(found, {"A": torch.tensor([[3.0, 0, 0], [0, 0, 0]]), "s": torch.tensor(4.0)}, 2.0)
    torch.testing.assert_close(found["A"][0, 0], torch.tensor(3 * 2 / 5))
    torch.testing.assert_close(found["s"], torch.tensor(4 * 2 / 5))


def test_a_short_gradient_keeps_its_values() -> None:
    found = sums()
    add_clipped(found, {"A": torch.full((2, 3), 0.1), "s": torch.tensor(0.2)}, 2.0)
    assert torch.equal(found["A"], torch.full((2, 3), 0.1)) and float(found["s"]) == pytest.approx(0.2)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_adds_nothing(bad: float) -> None:
    found = sums()
    add_clipped(found, {"A": torch.ones(2, 3), "s": torch.tensor(bad)}, 2.0)
    assert not any(value.any() for value in found.values())


def test_no_gradient_adds_nothing() -> None:
    found = sums()
    add_clipped(found, sums(), 2.0)
    assert not any(value.any() for value in found.values())


@given(
    draw.lists(draw.floats(-1e30, 1e30), min_size=7, max_size=7),
    draw.floats(1e-3, 1e3),
)
def test_one_row_moves_a_sum_by_no_more_than_the_clip_norm(values: list[float], clip_norm: float) -> None:
    found = sums()
    gradient = torch.tensor(values)
    add_clipped(found, {"A": gradient[:6].reshape(2, 3), "s": gradient[6]}, clip_norm)
    moved = torch.cat([value.flatten() for value in found.values()]).double().norm()
    assert bool(moved.isfinite()) and float(moved) <= clip_norm * (1 + 1e-6)
