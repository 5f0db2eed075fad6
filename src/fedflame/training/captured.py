"""Steps as CUDA graphs: what the program has launched once, the GPU runs again without the program.

A step of a real model is a few thousand kernels, and launching them takes longer than they run where few
experts are active. A graph of all of them is launched at once. It runs the same kernels on the same places in
memory, so a step is captured once for all batches of the same sizes, and reads each batch from one place.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from fedflame.data.batches import PlacedBatch

WAITS = "synchronizing CUDA operation"
"""What torch's warning says."""
_WARM_UP = 2
"""Steps of the same sizes before the third is captured: one that compiles, and one that is watched."""

Step = Callable[[PlacedBatch], Tensor]


class CapturedSteps:
    """Runs `step(batch)`, from the third batch of the same sizes on as a graph.

    Args:
        step: whatever it changes on the device, other than `changed`, it changes in place and for itself.
        changed: the tensors that it changes and that others read; torch's count of their changes goes on.
    """

    def __init__(self, step: Step, changed: Sequence[Tensor]) -> None:
        self._step, self._changed = step, changed
        self._taken: Counter[object] = Counter()
        self._graphs: dict[object, _Graph] = {}
        self._pool: Any = None
        self._waits = False

    def __call__(self, batch: PlacedBatch) -> Tensor:
        sizes = tuple(None if value is None else value.shape for value in batch)
        self._taken[sizes] += 1
        if self._waits or self._taken[sizes] < _WARM_UP:
            return self._step(batch)
        if self._taken[sizes] == _WARM_UP:
            return self._watched(batch)
        if sizes not in self._graphs:
            increment_version(self._changed)  # whoever keeps something made of them makes it within the graph
            self._graphs[sizes] = graph = _Graph(self._step, batch, self._pool)
            self._pool = graph.pool
        loss = self._graphs[sizes].replay(batch)
        increment_version(self._changed)
        return loss

    def _watched(self, batch: PlacedBatch) -> Tensor:
        """Run a step and see whether it waits for the GPU: such a step, of some families, has no graph."""
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                loss = self._step(batch)
        finally:
            torch.cuda.set_sync_debug_mode(before)
        self._waits = any(WAITS in str(one.message) for one in said)
        return loss


class _Graph:
    """One captured step, with the place that it reads its batch from."""

    def __init__(self, step: Step, batch: PlacedBatch, pool: Any) -> None:
        self._batch = PlacedBatch._make(None if value is None else value.clone() for value in batch)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool):
            self._loss = step(self._batch)
        self.pool = self._graph.pool()

    def replay(self, batch: PlacedBatch) -> Tensor:
        """Run the step on this batch; return its loss."""
        for place, value in zip(self._batch, batch, strict=True):
            if place is not None and value is not None:
                place.copy_(value, non_blocking=True)
        self._graph.replay()
        return self._loss.clone()
