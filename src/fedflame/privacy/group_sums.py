"""What a member adds to the sum of its group, and what the sum means: one update for all of them.

For every value the sum holds w_i times delta_i, and for every expert w_i, where w_i is the weight that the
aggregation gives this client: its share p_i of the group's rows times f_i^t (`strategies.flame`). So the sum
over a group determines the weighted mean, and nothing else is needed of a client. Frequencies are taken
relative to even use, which makes weights about one: sums are fixed-point numbers (`privacy.ring`).

Shapes: L layers, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from torch import Tensor

from fedflame.errors import InvalidMessage
from fedflame.messages import Adapter, ClientUpdate, RoundPlan, is_trained
from fedflame.privacy.masks import masked
from fedflame.privacy.ring import from_ring, to_ring
from fedflame.privacy.sum_request import Member, SumRequest

_PARTS = 1 << 40
"""Tokens that a group's update claims, so that its counts say any frequency exactly enough."""


def contribution(update: ClientUpdate, rows: int, request: SumRequest) -> np.ndarray:
    """Return what a client with so many rows adds to the sum of its group, uint32 [n].

    Raises:
        UserError: see `to_ring`.
    """
    share = torch.tensor([rows / request.rows], dtype=torch.float64)
    weights = share * _relative_frequency(update, request) ** request.temperature
    parts = [share, update.rescaler_values * share, *([weights] if request.temperature else [])]
    for name, delta in _trained(update.delta, update):
        parts.append(delta * _broadcast(_weight(name, weights, share), delta))
    return to_ring(torch.cat([part.flatten() for part in parts]))


def masked_contribution(
    update: ClientUpdate, me: Member, own: X25519PrivateKey, request: SumRequest
) -> bytes:
    """Return the contribution of a member under the masks that it shares with all others, in bytes.

    Raises:
        UserError: see `to_ring`.
        ValueError: see `masked`.
    """
    peers = {peer.name: bytes.fromhex(peer.key) for peer in request.members if peer is not me}
    values = contribution(update, me.rows, request)
    return masked(values, me.name, own, peers, request.encoded()).tobytes()


def length_of_sum(plan: RoundPlan, request: SumRequest) -> int:
    """Return n, the number of values in a sum over clients with this plan."""
    layers = len(plan.rescaler_values)
    weights = layers * _experts(plan.adapter) if request.temperature else 0
    values = plan.adapter.tensors().items()
    return 1 + layers + weights + sum(v.numel() for name, v in values if is_trained(name, plan.trainable))


def group_update(total: np.ndarray, request: SumRequest, like: ClientUpdate, plan: RoundPlan) -> ClientUpdate:
    """Return the sum as the update of one client that has the group's rows and the group's mean.

    Args:
        total: uint32 [n], the sum over the members of `request`.
        request: what they were asked for.
        like: an update with the group's round, k and steps; its values are replaced.
        plan: of any of them.

    Raises:
        InvalidMessage: the masks have not cancelled, since the members were told different things.
    """
    shares = torch.tensor([member.rows / request.rows for member in request.members], dtype=torch.float64)
    expected = np.sum(to_ring(shares), dtype=np.uint32)
    if len(total) != length_of_sum(plan, request) or total[0] != expected:
        raise InvalidMessage(
            "the masks of the group do not cancel: its members were asked, or given, different things"
        )
    values = _Values(from_ring(total))
    share, layers, experts = values.take(1), len(plan.rescaler_values), _experts(plan.adapter)
    rescalers = values.take(layers) / share
    weights = values.take(layers, experts) if request.temperature else share.expand(layers, experts)
    found = {}
    for name, value in _trained(plan.adapter, plan):
        divisor = _broadcast(_weight(name, weights, share), value)
        found[name] = torch.where(divisor > 0, values.take(*value.shape) / divisor, 0.0).float()
    zeros = {name: torch.zeros_like(value) for name, value in plan.adapter.tensors().items()}
    return replace(
        like,
        delta=Adapter.from_tensors(zeros | found),
        rescaler_values=rescalers.float(),
        counts=_counts(weights / share, request, experts),
        tokens=_PARTS,
        num_examples=request.rows,
        trained_examples=request.rows,
    )


def _relative_frequency(update: ClientUpdate, request: SumRequest) -> Tensor:
    """Return f [L,E] over what it is when all experts are used alike, so that weights are about one."""
    return update.counts.double() / update.tokens / _even(request, update.counts.shape[1])


def _counts(powers: Tensor, request: SumRequest, experts: int) -> Tensor:
    """Return counts [L,E] whose frequency to the power of the temperature is the group's weight.

    `powers` [L,E] is that weight relative to even use. Without a temperature no weight depends on counts.
    """
    relative = powers.clamp(min=0) ** (1 / request.temperature) if request.temperature else powers
    return (relative * _even(request, experts) * _PARTS).round().to(torch.int64)


def _even(request: SumRequest, experts: int) -> float:
    """Return c / T where all experts are used alike."""
    return request.active_experts / experts


def _weight(name: str, weights: Tensor, share: Tensor) -> Tensor:
    """Return the weight of a value: that of each expert in its layer [E], or the client's share [1]."""
    group, layer = name.split(".")[:2]
    return weights[int(layer)] if group == "experts" else share


def _broadcast(weight: Tensor, value: Tensor) -> Tensor:
    return weight.view(-1, *[1] * (value.dim() - 1))


def _experts(adapter: Adapter) -> int:
    return next(iter(adapter.experts.values())).shape[0]


def _trained(adapter: Adapter, of: ClientUpdate | RoundPlan) -> Iterator[tuple[str, Tensor]]:
    """Yield the values of the trained half, in the order of their names."""
    for name, value in sorted(adapter.tensors().items()):
        if is_trained(name, of.trainable):
            yield name, value


class _Values:
    """Reads a flat vector part by part."""

    def __init__(self, flat: Tensor) -> None:
        self._flat, self._at = flat, 0

    def take(self, *shape: int) -> Tensor:
        """Return the next values in this shape."""
        count = int(np.prod(shape))
        part = self._flat[self._at : self._at + count]
        self._at += count
        return part.view(shape)
