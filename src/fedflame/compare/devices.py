"""Simulated wall time on unequal devices: a round takes as long as its slowest client.

A client's budget k is what its device affords. By definition, the device trains k experts per token in the
time in which the strongest device trains the model's own K. So its speed in FLOPs per second is that of the
strongest device times FLOPs(k) / FLOPs(K), per trained token. A method that runs more than k experts there
takes longer, and the round waits for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field


class Devices(BaseModel):
    """The speeds of the strongest device and of the connections. The defaults are assumptions."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    flops_per_second: Annotated[float, Field(gt=0)] = 1e10
    """Sustained FLOPs per second of the device that affords the model's K. Default: about one laptop core."""
    bytes_per_second: Annotated[float, Field(gt=0)] = 1.25e7
    """Bytes per second of every client's connection, up and down. Default: 100 Mbit/s."""


@dataclass(frozen=True)
class ClientWork:
    """What one client computed and sent in one round."""

    round: int
    client: int
    budget: int
    """Experts per token that its device affords."""
    active_experts: int
    """Experts per token that it ran."""
    tokens: int
    seconds: float
    """Seconds measured on the machine of the run."""
    training_flops: float
    bytes_up: int
    bytes_down: int


def client_seconds(cost: ClientWork, training_flops: Mapping[int, float], devices: Devices) -> float:
    """Return the simulated seconds of one client's round: its computation, then its transfers up and down.

    Args:
        cost: what the client computed and sent.
        training_flops: k -> FLOPs per trained token, for the client's budget and for K, the largest key.
        devices: the speeds of the strongest device and of the connections.
    """
    speed = devices.flops_per_second * training_flops[cost.budget] / training_flops[max(training_flops)]
    return cost.training_flops / speed + (cost.bytes_up + cost.bytes_down) / devices.bytes_per_second


def round_seconds(
    clients: Sequence[ClientWork], training_flops: Mapping[int, float], devices: Devices
) -> float:
    """Return the simulated seconds of a round: those of its slowest client; 0 without clients."""
    return max((client_seconds(cost, training_flops, devices) for cost in clients), default=0.0)
