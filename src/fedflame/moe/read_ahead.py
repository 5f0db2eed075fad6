"""Read the experts of the next layer from their files while this layer computes.

For a memory-mapped base (`base.mapped`). The kernel's own read-ahead is so short that computing and reading
would take turns. Here a thread touches the weights of the next layer, expert by expert, in the order in which
they will be used. It changes no value.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from threading import Thread

import torch
from torch import Tensor, nn

from fedflame.moe.families import MoELayer

ROWS_PER_EXPERT = 4
"""Read ahead only from this mean number of rows per expert on. With fewer, many experts have none."""


def read_ahead(layers: Sequence[MoELayer]) -> None:
    """Start reading ahead: the forward reads the layer after each layer, the backward the layer before it."""
    wanted: SimpleQueue[MoELayer] = SimpleQueue()
    for below, layer, above in zip([None, *layers], layers, [*layers[1:], None], strict=False):
        layer.experts.register_forward_hook(_asking(layer, above, below, wanted))
    Thread(target=_read, args=(wanted,), daemon=True).start()


def _asking(
    layer: MoELayer, above: MoELayer | None, below: MoELayer | None, wanted: SimpleQueue[MoELayer]
) -> Callable[..., None]:
    def hook(experts: nn.Module, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        x, top_k_index, _ = inputs
        computed_again = torch._C._current_graph_task_id() != -1  # by gradient checkpointing
        if computed_again or top_k_index.numel() < ROWS_PER_EXPERT * layer.num_experts:
            return
        if above is not None:
            wanted.put(above)
        if below is not None and x.requires_grad:
            x.register_hook(lambda _: wanted.put(below))

    return hook


def _read(wanted: SimpleQueue[MoELayer]) -> None:
    while True:
        frozen = wanted.get().frozen()
        for expert in zip(frozen.gate_up, frozen.down, strict=True):
            if not wanted.empty():
                break  # the model has already reached the next layer
            for weight in expert:
                stored = weight if weight.is_contiguous() else weight.mT
                stored.view(-1)[:: mmap.PAGESIZE // weight.itemsize].sum()
