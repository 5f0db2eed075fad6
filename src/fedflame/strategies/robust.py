"""Means that a few clients cannot decide, in place of `WeightedMean`. They are chosen when a method is built.

Per value or per expert only the clients count that have a weight there. With fewer than three of them each is
the weighted mean: of two, neither can be told to be the wrong one.
"""

from __future__ import annotations

import tempfile
import weakref

import torch
from torch import Tensor

from fedflame.config.words import RobustRule
from fedflame.strategies.base import WeightedMean

FEWEST = 3
"""Clients that a robust mean needs."""
PASSES = 8
"""Of the smoothed Weiszfeld algorithm. Each brings the pull of one far client in five down to a quarter. The
bounds of a round let no client be very far, and the paper finds 3 to 5 passes enough."""
SMOOTHING = 1e-6
"""The least distance from the median that a client is taken to have; the paper's nu."""


def mean_by(rule: RobustRule) -> WeightedMean:
    """Return an empty mean of this kind."""
    kinds = {"none": WeightedMean, "trimmed_mean": TrimmedMean, "geometric_median": GeometricMedian}
    return kinds[rule]()


class TrimmedMean(WeightedMean):
    """Weighted mean without the largest and the smallest value of each coordinate.

    Yin et al.: Byzantine-Robust Distributed Learning, arXiv 1803.01498, with one client trimmed at each end.
    Its memory holds six adapters: sum and weights of what is between the ends, and both ends with their
    weights. The ends are not in the sum, so that a huge value takes no digit from it.
    """

    def __init__(self) -> None:
        super().__init__()
        self._ends: dict[str, tuple[Tensor, Tensor, Tensor, Tensor]] = {}
        self._counts: dict[str, Tensor] = {}

    def add(self, name: str, value: Tensor, weight: Tensor | float) -> None:
        weights = torch.as_tensor(weight, dtype=torch.float32)
        value, per_value = value.float(), _per_value(weights, value).expand(value.shape)
        if name not in self._sums:
            nothing = torch.zeros_like(value)
            self._sums[name], self._weights[name] = nothing, nothing.clone()
            self._ends[name] = (nothing, nothing, nothing, nothing)
            self._counts[name] = torch.zeros_like(weights)
        self._counts[name] += weights > 0
        high, of_high, low, of_low = self._ends[name]
        high, of_high, value, per_value = _outer(high, of_high, value, per_value, 1.0)
        low, of_low, value, per_value = _outer(low, of_low, value, per_value, -1.0)
        self._ends[name] = (high, of_high, low, of_low)
        self._sums[name] = self._sums[name] + value * per_value
        self._weights[name] = self._weights[name] + per_value

    def mean(self, name: str) -> Tensor:
        """Return the trimmed mean; zero where the weights sum to zero."""
        total, weights = self._sums[name], self._weights[name]
        high, of_high, low, of_low = self._ends[name]
        enough = _per_value(self._counts[name], total) >= FEWEST
        whole = weights + of_high + of_low
        plain = torch.where(whole > 0, (total + high * of_high + low * of_low) / whole, 0.0)
        return torch.where(enough, total / weights, plain)


def _outer(
    end: Tensor, of_end: Tensor, value: Tensor, weight: Tensor, sign: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the further of an end and a value, in the direction of `sign`, and then the other.

    Each has its weight beside it. Without a weight there is nothing. Of equal values the one with more weight
    is further, so that the order of clients does not decide.
    """
    further = (sign * value > sign * end) | ((value == end) & (weight > of_end)) | (of_end == 0)
    further &= weight > 0
    return (
        torch.where(further, value, end),
        torch.where(further, weight, of_end),
        torch.where(further, end, value),
        torch.where(further, of_end, weight),
    )


class GeometricMedian(WeightedMean):
    """The point with the least weighted sum of distances to the clients' values, for each name and expert.

    Pillutla et al.: Robust Aggregation for Federated Learning (RFA), arXiv 1912.13445: `PASSES` of the
    smoothed Weiszfeld algorithm, from the weighted mean. In each, a client has its weight over its distance
    from the last point. The values wait in a file without a name in the folder for temporary files (TMPDIR),
    which is gone also after a kill. One adapter is in memory, and a few values of one name.
    """

    def __init__(self) -> None:
        super().__init__()
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the mean)
        weakref.finalize(self, self._file.close)
        self._kept: dict[str, list[tuple[int, Tensor]]] = {}

    def add(self, name: str, value: Tensor, weight: Tensor | float) -> None:
        super().add(name, value, weight)
        place = self._file.seek(0, 2)
        self._file.write(value.float().contiguous().numpy().tobytes())
        self._kept.setdefault(name, []).append((place, torch.as_tensor(weight, dtype=torch.float32)))

    def mean(self, name: str) -> Tensor:
        """Return the geometric median; zero where the weights sum to zero."""
        plain = super().mean(name)
        enough = torch.stack([weight > 0 for _, weight in self._kept[name]]).sum(0) >= FEWEST
        point = plain
        for _ in range(PASSES if bool(enough.any()) else 0):
            step = WeightedMean()
            for place, weight in self._kept[name]:
                value = self._read(place, plain)
                step.add(name, value, weight / _distance(value, point, weight).clamp(min=SMOOTHING))
            point = step.mean(name)
        return torch.where(_per_value(enough, plain), point, plain)

    def _read(self, place: int, like: Tensor) -> Tensor:
        self._file.seek(place)
        buffer = bytearray(self._file.read(4 * like.numel()))
        return torch.frombuffer(buffer, dtype=torch.float32).view(like.shape)


def _distance(value: Tensor, point: Tensor, weight: Tensor) -> Tensor:
    """Return the distance for each expert where the weight has experts, else of the whole."""
    difference = (value - point).flatten(1 if weight.dim() else 0)
    distance: Tensor = torch.linalg.vector_norm(difference, dim=-1)
    return distance


def _per_value(per_expert: Tensor, value: Tensor) -> Tensor:
    """Return [E] or a number in a shape that broadcasts to the value."""
    return per_expert.view(-1, *[1] * (value.dim() - 1)) if per_expert.dim() else per_expert
