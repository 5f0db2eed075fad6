"""Random rows, and rounds of one client that learns from them."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import torch
from tests.tiny_models import PAD, VOCABULARY
from torch import Tensor

from fedflame.data.encoding import EncodedRow
from fedflame.messages import ClientUpdate, RoundPlan
from fedflame.moe.adapted_model import AdaptedModel
from fedflame.training.fine_tune import fine_tune
from fedflame.wire.codec import encode_update

LONGEST = 16
"""Tokens that no row has more of."""


def rows(count: int, seed: int = 0) -> list[EncodedRow]:
    """Random rows of 6 to 13 tokens, a third of them prompt or so."""
    draw = random.Random(seed)
    lengths = [draw.randint(6, 13) for _ in range(count)]
    return [
        EncodedRow([draw.randrange(3, VOCABULARY) for _ in range(n)], draw.randint(1, 4), False)
        for n in lengths
    ]


def plan_for(adapted: AdaptedModel, **changes: Any) -> RoundPlan:
    plan = RoundPlan(
        round=3,
        client=5,
        seed=11,
        active_experts=2,
        rescaler="learned",
        rescaler_values=torch.tensor([0.9, 1.2]),
        adapter=adapted.initial_adapter(0),
        learning_rate=0.01,
        weight_decay=0.1,
        batch_size=4,
        max_steps=3,
    )
    return replace(plan, **changes)


def train(adapted: AdaptedModel, examples: list[EncodedRow], **changes: Any) -> bytes:
    plan = plan_for(adapted, **changes)
    return encode_update(fine_tune(adapted, examples, plan, PAD), plan)


def deltas(update: ClientUpdate) -> Tensor:
    """All of them as one vector."""
    return torch.cat([delta.flatten() for delta in update.delta.tensors().values()])
