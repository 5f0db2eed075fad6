"""Plans and updates for tests of messages and of their bytes, every dimension different."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields

import torch
from tests.same_bits import assert_same_adapter, assert_same_bits
from torch import Tensor

from fedflame.messages import Adapter, ClientUpdate, RoundPlan

Shape = tuple[int, int, int, int, int]
"""L layers, E experts, R rank, H hidden, I expert width."""
SHAPE: Shape = (2, 5, 3, 7, 4)
IN, OUT = 6, 9
MAX_LENGTH = 20
"""Tokens of the longest row."""


def random_bits(generator: torch.Generator, *shape: int) -> Tensor:
    """fp32 of any bit pattern: denormals, both zeros, infinities and NaNs with their payloads."""
    return torch.randint(-(2**31), 2**31, shape, generator=generator).to(torch.int32).view(torch.float32)


def random_numbers(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator)


def adapter_of(shape: Shape, values: Callable[..., Tensor], generator: torch.Generator) -> Adapter:
    layers, experts, rank, hidden, width = shape
    banks = {
        "A1": (experts, 2 * rank, hidden),
        "B1": (experts, 2 * width, rank),
        "A2": (experts, rank, width),
        "B2": (experts, hidden, rank),
    }
    attention = {"layers.0.q_proj.A": (rank, IN), "layers.0.q_proj.B": (OUT, rank)}
    return Adapter(
        {
            f"{layer}.{name}": values(generator, *size)
            for layer in range(layers)
            for name, size in banks.items()
        },
        {name: values(generator, *size) for name, size in attention.items()},
    )


def of_rank(rank: int, seed: int = 0) -> Adapter:
    """An adapter of this rank and otherwise of `SHAPE`, of random numbers."""
    layers, experts, _, hidden, width = SHAPE
    generator = torch.Generator().manual_seed(seed)
    return adapter_of((layers, experts, rank, hidden, width), random_numbers, generator)


def a_plan(shape: Shape = SHAPE, seed: int = 0, values: Callable[..., Tensor] = random_numbers) -> RoundPlan:
    generator = torch.Generator().manual_seed(seed)
    return RoundPlan(
        round=3,
        client=7,
        seed=2**62 + 1,
        active_experts=min(2, shape[1]),
        rescaler="learned",
        rescaler_values=values(generator, shape[0]),
        adapter=adapter_of(shape, values, generator),
        learning_rate=1e-3,
        weight_decay=0.1,
        batch_size=4,
        max_steps=25,
        tokens_per_step=96,
        num_train_epochs=1.5,
        lr_scheduler_type="linear",
        warmup_rounds=0.25,
        max_grad_norm=0.5,
        lora_dropout=0.25,
        router_aux_loss_coef=0.01,
    )


def an_update(
    shape: Shape = SHAPE,
    seed: int = 1,
    values: Callable[..., Tensor] = random_numbers,
    counts: Tensor | None = None,
) -> ClientUpdate:
    """An update with zero deltas where no token was counted, as training leaves it."""
    generator = torch.Generator().manual_seed(seed)
    if counts is None:
        counts = torch.randint(0, 3, shape[:2], generator=generator)
    delta = adapter_of(shape, values, generator)
    experts = {
        name: torch.where((counts[int(name.split(".")[0])] > 0)[:, None, None], value, 0.0)
        for name, value in delta.experts.items()
    }
    return ClientUpdate(
        round=3,
        client=7,
        active_experts=2,
        delta=Adapter(experts, delta.attention),
        rescaler_values=values(generator, shape[0]),
        counts=counts,
        tokens=11,
        num_examples=40,
        trained_examples=9,
        steps=5,
        loss=1.25,
    )


VALID_COUNTS = torch.tensor([[11, 6, 5, 0, 0], [0, 11, 0, 0, 11]])
"""Of 11 tokens with k = 2: one expert saw every token, and each layer's sum is just tokens x k."""


def valid_update() -> ClientUpdate:
    return an_update(counts=VALID_COUNTS.clone())


def assert_same_message(got: RoundPlan | ClientUpdate, wanted: RoundPlan | ClientUpdate) -> None:
    assert type(got) is type(wanted)
    for field in fields(wanted):
        a, b = getattr(got, field.name), getattr(wanted, field.name)
        if isinstance(b, Adapter):
            assert_same_adapter(a, b)
        elif isinstance(b, Tensor):
            assert_same_bits(a, b, field.name)
        else:
            assert (type(a), repr(a)) == (type(b), repr(b)), field.name


def assert_usable(update: ClientUpdate, plan: RoundPlan) -> None:
    """What aggregation relies on: the plan's shapes, finite values, counts and weights that make sense."""
    values = update.delta.tensors() | {"rescaler_values": update.rescaler_values}
    wanted = plan.adapter.tensors() | {"rescaler_values": plan.rescaler_values}
    assert {name: value.shape for name, value in values.items()} == {
        name: value.shape for name, value in wanted.items()
    }
    numbers = [number for value in values.values() for number in value.flatten().tolist()]
    assert all(math.isfinite(number) for number in [*numbers, update.loss])
    for layer in update.counts.tolist():
        assert all(0 <= count <= update.tokens for count in layer)
        assert sum(layer) == update.tokens * plan.active_experts
    assert 1 <= update.tokens <= update.steps * max(plan.tokens_per_step, MAX_LENGTH)
    assert 1 <= update.trained_examples <= min(update.num_examples, update.tokens)
