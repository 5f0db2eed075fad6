"""The same bytes from the same plan, whatever the process or clients before did to the model."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.tiny_models import LAYERS, PAD, TOP_K, random_adapter, random_batch, tiny_adapted, tiny_olmoe
from tests.training.one_client import plan_for, rows, train

from fedflame.moe.adapted_model import AdaptedModel
from fedflame.training.fine_tune import fine_tune
from fedflame.training.token_loss import token_losses

# The same bytes


@pytest.mark.parametrize(
    "changes",
    [
        {"rescaler": "learned"},
        {"rescaler": "fixed"},
        {"rescaler": "mass"},
        {"packed_length": 40},
        {"padding_free": True},
    ],
    ids=str,
)
def test_two_runs_give_the_same_bytes_whatever_the_global_generators_hold(changes: dict[str, Any]) -> None:
    first = train(tiny_adapted(), rows(9), **changes)
    torch.manual_seed(77)
    random.seed(77)
    assert train(tiny_adapted(), rows(9), **changes) == first


def test_training_leaves_the_global_generators_alone() -> None:
    adapted = tiny_adapted()
    before = torch.get_rng_state(), random.getstate()
    train(adapted, rows(9), rescaler="mass")
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]


@pytest.mark.parametrize("part", ["seed", "round", "client"])
def test_batches_follow_seed_round_and_client(part: str) -> None:
    adapted = tiny_adapted()
    one, other = (
        fine_tune(adapted, rows(9), plan_for(adapted, max_steps=1, **{part: value}), PAD) for value in (1, 2)
    )
    assert one.loss != other.loss


@pytest.mark.parametrize(
    "other",
    [
        {"active_experts": 1, "rescaler": "learned", "max_steps": 5},
        {"active_experts": TOP_K, "rescaler": "mass"},
        {"active_experts": 3, "rescaler": "fixed", "rescaler_values": torch.tensor([3.0, -1.0])},
        {"rescaler": "fixed", "trainable": "B", "merged": random_adapter(tiny_adapted(r=3))},
    ],
    ids=lambda other: other["rescaler"],
)
@pytest.mark.parametrize("rescaler", ["learned", "fixed", "mass"])
def test_a_client_after_another_gives_the_bytes_it_gives_alone(rescaler: str, other: dict[str, Any]) -> None:
    alone = train(tiny_adapted(), rows(9), rescaler=rescaler)
    shared = tiny_adapted()
    train(shared, rows(7, seed=1), client=4, adapter=random_adapter(shared), **other)
    assert train(shared, rows(9), rescaler=rescaler) == alone


# A client that breaks: its round goes on without it


def broken(*_: object) -> None:
    raise MemoryError("broken")


def break_forward(adapted: AdaptedModel) -> Any:
    return adapted.layers[1].router.register_forward_pre_hook(broken)


def break_backward(adapted: AdaptedModel) -> Any:
    return adapted.loras[0].A1.register_hook(broken)


@pytest.mark.parametrize("break_in", [break_forward, break_backward])
def test_a_client_after_one_that_broke_gives_the_bytes_it_gives_alone(
    break_in: Callable[[AdaptedModel], Any],
) -> None:
    alone = train(tiny_adapted(), rows(9))
    shared = tiny_adapted()
    hook = break_in(shared)
    with pytest.raises(MemoryError):
        train(shared, rows(7, seed=1), client=4)
    hook.remove()
    assert train(shared, rows(9)) == alone


@pytest.mark.parametrize("break_in", [break_forward, break_backward])
def test_the_model_can_be_evaluated_after_a_client_broke(break_in: Callable[[AdaptedModel], Any]) -> None:
    adapted = tiny_adapted()
    hook = break_in(adapted)
    with pytest.raises(MemoryError):
        train(adapted, rows(7, seed=1))
    hook.remove()
    batch = random_batch()
    adapted.load(adapted.initial_adapter(0), torch.ones(LAYERS))
    with torch.no_grad():
        torch.testing.assert_close(token_losses(adapted, batch).mean(), tiny_olmoe()(**vars(batch)).loss)
