"""Steps as CUDA graphs: what the program has launched once, the GPU runs again without the program.

A step of a real model is a few thousand kernels, and launching them takes longer than they run where few
experts are active. A graph of all of them is launched at once. It runs the same kernels on the same places in
memory, so a step is captured once for all batches of the same sizes, and reads each batch from one place.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from fedflame.data.batches import PlacedBatch

WAITS = "synchronizing CUDA operation"
"""What torch's warning says."""
_WARM_UP = 2
"""Steps of the same sizes before the third is captured: one that compiles, and one that is watched."""
_MOST_DROPS = 3
"""How often the graphs may give way to a larger step before there are none any more."""

Step = Callable[[PlacedBatch], Tensor]


class CapturedSteps:
    """Runs `step(batch)`, from the third batch of the same sizes on as a graph.

    All graphs share memory, since none runs beside another. They give it back where a step that is not
    captured yet would find too little.

    Args:
        step: whatever it changes on the device, other than `changed`, it changes in place and for itself.
        changed: the tensors that it changes and that others read; torch's count of their changes goes on.
    """

    def __init__(self, step: Step, changed: Sequence[Tensor]) -> None:
        self._step, self._changed = step, changed
        self._taken: Counter[object] = Counter()
        self._graphs: dict[object, _Graph] = {}
        self._memory = _Memory()
        self._drops = 0
        self._never = False

    def __call__(self, batch: PlacedBatch) -> Tensor:
        sizes = tuple(None if value is None else value.shape for value in batch)
        self._taken[sizes] += 1
        if sizes not in self._graphs and self._graphs and not self._memory.has_room(batch):
            self._drop()
        if self._never or self._taken[sizes] < _WARM_UP:
            return self._step(batch)
        if self._taken[sizes] == _WARM_UP:
            return self._watched(batch)
        if sizes not in self._graphs:
            self._graphs[sizes] = self._captured(batch)
        loss = self._graphs[sizes].replay(batch)
        increment_version(self._changed)
        return loss

    def _watched(self, batch: PlacedBatch) -> Tensor:
        """Run a step, and see what memory it takes, and whether it waits for the GPU.

        A step that waits, as those of some families do, has no graph.
        """
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as said, self._memory.measured(batch):
                warnings.simplefilter("always")
                loss = self._step(batch)
        finally:
            torch.cuda.set_sync_debug_mode(before)
        self._never = self._never or any(WAITS in str(one.message) for one in said)
        return loss

    def _captured(self, batch: PlacedBatch) -> _Graph:
        increment_version(self._changed)  # whoever keeps something made of them makes it within the graph
        with self._memory.held_more():
            pool = next((graph.pool for graph in self._graphs.values()), None)
            return _Graph(self._step, batch, pool)

    def _drop(self) -> None:
        self._graphs.clear()
        self._memory.held = 0
        torch.cuda.empty_cache()
        self._drops += 1
        self._never = self._drops >= _MOST_DROPS


class _Memory:
    """What steps take of the card, and what the graphs hold."""

    def __init__(self) -> None:
        self.held = 0
        """Bytes of all graphs."""
        self._of_a_token = 0.0
        """The most bytes for each token of a step."""

    def has_room(self, batch: PlacedBatch) -> bool:
        """Whether a step on this batch finds enough memory beside the graphs, as far as others tell."""
        cached = torch.cuda.memory_reserved() - torch.cuda.memory_allocated() - self.held
        return self._of_a_token * batch.input_ids.numel() <= torch.cuda.mem_get_info()[0] + cached

    @contextmanager
    def measured(self, batch: PlacedBatch) -> Iterator[None]:
        """Note what the step within the block takes."""
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        yield
        taken = (torch.cuda.max_memory_allocated() - before) / batch.input_ids.numel()
        self._of_a_token = max(self._of_a_token, taken)

    @contextmanager
    def held_more(self) -> Iterator[None]:
        """Note what the graph that is made within the block holds."""
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        yield
        self.held += max(0, torch.cuda.memory_reserved() - before)


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
