"""Both layouts against a plain loop over the experts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedflame.moe.expert_products import Padded, Ragged

INNER, OUTER = 8, 12
Layout = type[Ragged] | type[Padded]

per_expert = st.lists(st.integers(0, 5), min_size=1, max_size=6).filter(any)


def numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def by_expert(rows: Tensor, counts: list[int]) -> list[Tensor]:
    return list(rows.split(counts))


@pytest.mark.parametrize("layout", [Ragged, Padded])
@given(counts=per_expert)
def test_taken_rows_are_given_back(layout: Layout, counts: list[int]) -> None:
    rows = numbers(sum(counts), INNER, seed=0)
    products = layout.of(torch.tensor(counts))
    assert torch.equal(products.give(products.take(rows)), rows)


@pytest.mark.parametrize("layout", [Ragged, Padded])
@given(counts=per_expert)
def test_each_row_meets_the_weights_of_its_expert(layout: Layout, counts: list[int]) -> None:
    rows, weights = numbers(sum(counts), INNER, seed=0), numbers(len(counts), INNER, OUTER, seed=1)
    products = layout.of(torch.tensor(counts))
    found = products.give(products.times(products.take(rows), weights))
    expected = [own @ weight for own, weight in zip(by_expert(rows, counts), weights, strict=True)]
    torch.testing.assert_close(found, torch.cat(expected))


@pytest.mark.parametrize("layout", [Ragged, Padded])
@given(counts=per_expert)
def test_outer_products_are_sums_over_the_experts_own_rows(layout: Layout, counts: list[int]) -> None:
    left, right = numbers(sum(counts), INNER, seed=0), numbers(sum(counts), OUTER, seed=1)
    products = layout.of(torch.tensor(counts))
    found = products.outer(products.scale_(products.take(left.clone()), 0.5), products.take(right))
    pairs = zip(by_expert(left, counts), by_expert(right, counts), strict=True)
    torch.testing.assert_close(found, torch.stack([0.5 * a.T @ b for a, b in pairs]))


def test_padding_fills_every_expert_up_to_the_largest() -> None:
    padded = Padded.of(torch.tensor([2, 0, 3]))
    assert padded.real.squeeze(2).tolist() == [[True, True, False], [False] * 3, [True] * 3]
    assert padded.take(torch.arange(5.0).unsqueeze(1))[padded.real.bool()].tolist() == [0, 1, 2, 3, 4]
