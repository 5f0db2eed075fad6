"""FlexLoRA against numpy's SVD of the dense mean."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.random_rounds import (
    RANK,
    K,
    Products,
    a_round,
    an_adapter,
    assert_close,
    mean_products,
    products,
    projections,
)

from fedflame.strategies import FedAvg, FlexLoRA
from fedflame.strategies.base import ClientProfile
from fedflame.strategies.flexlora import nearest_of_rank


def truncated(dense: Products, rank: int) -> Products:
    found = {}
    for name, value in dense.items():
        u, s, vt = np.linalg.svd(value, full_matrices=False)
        found[name] = (u[:, :rank] * s[:rank]) @ vt[:rank]
    return found


@pytest.mark.parametrize("ranks", [(3,), (3, 1), (1, 2, 3), (2, 3, 1, 1), (1, 1)])
def test_the_new_product_is_the_best_approximation_of_the_mean_of_the_products(
    ranks: tuple[int, ...],
) -> None:
    state, updates = a_round(FlexLoRA(K), 5, ranks)
    new = FlexLoRA(K).aggregate_train(state, updates)
    dense = mean_products(state.adapter, updates)
    assert_close(products(new.adapter), truncated(dense, RANK))
    for rank in (1, 2):
        told = FlexLoRA(K).configure_train(new, ClientProfile(0, 1, rank, 5))
        assert_close(products(told.adapter), truncated(dense, rank))


def test_b_carries_falling_singular_values_and_the_rows_of_a_are_orthonormal_also_without_any() -> None:
    """With clients of one rank the product has two ranks; the third row of A is there to learn from."""
    state, updates = a_round(FlexLoRA(K), 6, (1, 1))
    new = FlexLoRA(K).aggregate_train(state, updates)
    for b, a in projections(new.adapter).values():
        np.testing.assert_allclose(a @ a.T, np.eye(RANK), rtol=0, atol=1e-6)
        norms = np.linalg.norm(b, axis=0)
        assert norms[0] > norms[1] > 1e-3 > 1e-6 > norms[2]


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 12), st.integers(1, 12))
def test_of_any_rank_the_nearest_of_another_is_numpys_truncated_svd(
    seed: int, rank: int, wanted: int
) -> None:
    """Ranks above the widths of 4 to 9, too, where zeros fill up."""
    adapter = an_adapter(torch.Generator().manual_seed(seed), rank=rank)
    near = nearest_of_rank(adapter, wanted)
    assert near.rank == wanted
    assert_close(products(near), truncated(products(adapter), wanted), atol=1e-5 * rank)


def test_one_client_of_full_rank_gives_the_product_of_fedavg() -> None:
    state, updates = a_round(FlexLoRA(K), 7, (3,))
    one, other = (strategy.aggregate_train(state, updates) for strategy in (FlexLoRA(K), FedAvg(K)))
    assert_close(products(one.adapter), products(other.adapter))


def test_no_dense_matrix_is_formed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The SVD is of matrices as small as the stacked ranks, 2 + 1 and 3 for the state's own."""
    sizes = []
    svd = torch.linalg.svd

    def watched(matrix: torch.Tensor, full_matrices: bool) -> tuple[torch.Tensor, ...]:
        sizes.append(max(matrix.shape[-2:]))
        return svd(matrix, full_matrices=full_matrices)

    monkeypatch.setattr(torch.linalg, "svd", watched)
    FlexLoRA(K).aggregate_train(*a_round(FlexLoRA(K), 8, (2, 1)))
    assert max(sizes) == 6
