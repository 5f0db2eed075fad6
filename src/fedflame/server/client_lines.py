"""The line of metrics.jsonl that says what a client has done in a round."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from fedflame.messages import ClientUpdate, RoundPlan
from fedflame.privacy.ready import Ready
from fedflame.server.parts import Server
from fedflame.training.schedule import learning_rates

NOTHING_TOLD: Mapping[str, Any] = MappingProxyType(
    {
        "loss": None,
        "step_losses": [],
        "step_rates": [],
        "rescaler": [],
        "counts": [],
        "norms": {},
        "pace": None,
    }
)
"""What only an update tells that the hub sees by itself; here of one that it sees in a sum."""


def log_client(
    server: Server,
    plan: RoundPlan,
    said: ClientUpdate | Ready,
    tokens: int,
    seconds: float,
    bytes_up: int,
    bytes_down: int,
    told: Mapping[str, Any] = NOTHING_TOLD,
) -> None:
    """Log what the client of a plan has done.

    Args:
        server: whose metrics they are.
        plan: which it has answered.
        said: what it says of its rows and steps.
        tokens: that it trained on, as far as they are known.
        seconds: until its answer.
        bytes_up: from it, in this round.
        bytes_down: to it.
        told: the fields of `NOTHING_TOLD`.
    """
    k, rank = plan.active_experts, plan.adapter.rank
    server.metrics.log(
        "client",
        round=plan.round,
        client=plan.client,
        active_experts=k,
        rank=rank,
        learning_rate=sum(learning_rates(plan, said.steps)) / max(1, said.steps),
        tokens=tokens,
        steps=said.steps,
        num_examples=said.num_examples,
        trained_examples=said.trained_examples,
        seconds=round(seconds, 3),
        training_flops=tokens * server.training_flops(k, rank),
        bytes_up=bytes_up,
        bytes_down=bytes_down,
        **told,
    )
