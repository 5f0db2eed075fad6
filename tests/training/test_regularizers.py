"""The terms against plain numbers; their gradients are autograd's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.random_rounds import RANK, an_adapter, half_only, projections

from fedflame.messages import Adapter
from fedflame.training.regularizers import rank_penalty, squared_distance


def random_adapters(count: int) -> list[Adapter]:
    generator = torch.Generator().manual_seed(3)
    return [an_adapter(generator) for _ in range(count)]


def gradients(adapter: Adapter, kept: int) -> Adapter:
    """Those of the rank penalty."""
    values = {name: value.clone().requires_grad_() for name, value in adapter.tensors().items()}
    rank_penalty(Adapter.from_tensors(values), kept).backward()
    return Adapter.from_tensors({name: value.grad for name, value in values.items()})


def test_the_squared_distance_is_that_of_all_values() -> None:
    now, start = random_adapters(2)
    origin = start.tensors()
    wanted = sum(((v.double() - origin[name].double()) ** 2).sum() for name, v in now.tensors().items())
    assert squared_distance(now, start).item() == pytest.approx(float(wanted), rel=1e-5)
    assert squared_distance(now, now) == 0


def test_the_norms_are_those_of_the_last_ranks_of_all_products() -> None:
    adapter = random_adapters(1)[0]
    pairs = projections(adapter).values()
    wanted = [
        np.sqrt(sum((b[:, 2:] ** 2).sum() for b, _ in pairs)),
        np.sqrt(sum((a[2:] ** 2).sum() for _, a in pairs)),
    ]
    assert [norm.item() for norm in adapter.tail_norms(2)] == pytest.approx(wanted, rel=1e-6)
    assert adapter.tail_norms(RANK) == (0.0, 0.0)
    assert rank_penalty(adapter, 2).item() == pytest.approx(wanted[0] * wanted[1], rel=1e-6)


@pytest.mark.parametrize("kept", [1, 2])
def test_the_rank_penalty_pulls_the_last_ranks_alone(kept: int) -> None:
    slopes = gradients(random_adapters(1)[0], kept)
    assert not any(value.any() for value in slopes.with_rank(kept).tensors().values())
    assert all(value.any() for value in slopes.tensors().values())


def test_a_half_of_zeros_gets_no_penalty_and_no_nan() -> None:
    slopes = gradients(half_only(random_adapters(1)[0], "A"), 1)
    assert not any(value.any() for value in slopes.tensors().values())
