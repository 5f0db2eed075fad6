"""Three published methods, each one small dataclass: the interface of strategies must be wide enough.

FFA-LoRA (Sun et al., arXiv 2403.12313) trains B only; FLoRA (Wang et al., arXiv 2409.05976) stacks the
clients' factors and merges them into the base; FedEx-LoRA (Singhal et al., arXiv 2410.09432) averages A
and B and adds what the averages miss to the base. All are exact: the new model is the mean of the clients'.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from fedflame.messages import NOTHING, Adapter, ClientUpdate, half_of
from fedflame.strategies import FedAvg
from fedflame.strategies.base import ClientProfile, ServerState, TrainInstructions, in_client_order


@dataclass(frozen=True)
class FFALoRA(FedAvg):
    """B is trained and averaged, A stays where it started."""

    def configure_train(self, state: ServerState, client: ClientProfile) -> TrainInstructions:
        return replace(super().configure_train(state, client), trainable="B")


@dataclass(frozen=True)
class FLoRA(FedAvg):
    """The clients' factors, B weighed by rows, go into the base; the adapter starts again."""

    def aggregate_train(self, state: ServerState, updates: Iterable[ClientUpdate]) -> ServerState:
        return replace(state, merged=state.merged.concatenate(stacked(state, list(updates))))


@dataclass(frozen=True)
class FedExLoRA(FedAvg):
    """A and B are averaged; the mean of the products less the product of the means goes into the base."""

    def aggregate_train(self, state: ServerState, updates: Iterable[ClientUpdate]) -> ServerState:
        received = list(updates)
        if not received:
            return state
        averaged = super().aggregate_train(state, received)
        residue = stacked(state, received).concatenate(with_b_times(averaged.adapter, -1.0))
        return replace(averaged, merged=state.merged.concatenate(residue))


def stacked(state: ServerState, updates: list[ClientUpdate]) -> Adapter:
    """Factors whose product is sum_k p_k B_k A_k."""
    rows, stack = sum(update.num_examples for update in updates), NOTHING
    for update in in_client_order(updates):
        values = state.adapter.combine(update.delta, torch.add)
        stack = stack.concatenate(with_b_times(values, update.num_examples / rows))
    return stack


def with_b_times(adapter: Adapter, factor: float) -> Adapter:
    return Adapter.from_tensors(
        {name: value * factor if half_of(name) == "B" else value for name, value in adapter.tensors().items()}
    )
