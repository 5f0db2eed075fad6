"""The added gradients against autograd of the terms themselves."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from tests.random_rounds import RANK, an_adapter, half_only, projections
from torch import Tensor, nn

from fedflame.messages import Adapter, half_of
from fedflame.regularizers import add_proximal_gradient, add_rank_penalty_gradient


def parameters_of(adapter: Adapter) -> Adapter:
    """As parameters with gradients of one everywhere, as after a backward."""
    values = {name: nn.Parameter(value.clone()) for name, value in adapter.tensors().items()}
    for value in values.values():
        value.grad = torch.ones_like(value)
    return Adapter.from_tensors(values)


def random_adapters(count: int) -> list[Adapter]:
    generator = torch.Generator().manual_seed(3)
    return [an_adapter(generator) for _ in range(count)]


def assert_added(parameters: Adapter, term: Callable[[Adapter], Tensor]) -> None:
    """The gradients are those of one plus autograd's of the term."""
    values = {name: value.detach().double().requires_grad_() for name, value in parameters.tensors().items()}
    term(Adapter.from_tensors(values)).backward()
    for name, parameter in parameters.tensors().items():
        wanted = 1 + values[name].grad
        torch.testing.assert_close(parameter.grad.double(), wanted, rtol=1e-5, atol=1e-6, msg=name)


def test_the_proximal_gradient_is_autograds() -> None:
    now, start = random_adapters(2)
    parameters = parameters_of(now)
    add_proximal_gradient(parameters, start, 0.7)
    origin = start.tensors()
    assert_added(
        parameters,
        lambda w: 0.35 * sum(((v - origin[name].double()) ** 2).sum() for name, v in w.tensors().items()),
    )


def test_what_is_frozen_has_no_gradient_after_it_either() -> None:
    now, start = random_adapters(2)
    parameters = parameters_of(now)
    for name, value in parameters.tensors().items():
        if half_of(name) == "A":
            value.grad = None
    add_proximal_gradient(parameters, start, 0.7)
    assert all((value.grad is None) == (half_of(name) == "A") for name, value in parameters.tensors().items())


def by_hand(adapter: Adapter, kept: int) -> Tensor:
    """||B_>|| ||A_>||, with the ranks of gate and up in A1 taken apart by index."""
    r = adapter.rank
    b_squares, a_squares = [], []
    for name, value in adapter.tensors().items():
        if half_of(name) == "B":
            b_squares.append((value[..., kept:] ** 2).sum())
        else:
            late = [i for i in range(value.shape[-2]) if i % r >= kept]
            a_squares.append((value[..., late, :] ** 2).sum())
    return sum(b_squares).sqrt() * sum(a_squares).sqrt()


@pytest.mark.parametrize("kept", [1, 2])
def test_the_rank_penalty_is_autograds_and_leaves_the_first_ranks_alone(kept: int) -> None:
    parameters = parameters_of(random_adapters(1)[0])
    add_rank_penalty_gradient(parameters, kept, 0.3)
    assert_added(parameters, lambda w: 0.3 * by_hand(w, kept))
    gradients = Adapter.from_tensors({name: value.grad for name, value in parameters.tensors().items()})
    assert all((value == 1).all() for value in gradients.with_rank(kept).tensors().values())
    assert not any((value == 1).all() for value in gradients.tensors().values())


def test_the_norms_are_those_of_the_last_ranks_of_all_products() -> None:
    adapter = random_adapters(1)[0]
    pairs = projections(adapter).values()
    wanted = [
        np.sqrt(sum((b[:, 2:] ** 2).sum() for b, _ in pairs)),
        np.sqrt(sum((a[2:] ** 2).sum() for _, a in pairs)),
    ]
    assert adapter.tail_norms(2) == pytest.approx(wanted, rel=1e-12)
    assert adapter.tail_norms(RANK) == (0.0, 0.0)


def test_a_half_of_zeros_gets_no_penalty_and_no_nan() -> None:
    parameters = parameters_of(half_only(random_adapters(1)[0], "A"))
    add_rank_penalty_gradient(parameters, 1, 0.3)
    assert all((value.grad == 1).all() for value in parameters.tensors().values())
