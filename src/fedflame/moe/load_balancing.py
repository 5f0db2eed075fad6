"""The load-balancing loss of Switch Transformers (arXiv 2101.03961), as transformers computes it.

With f_e the share of the tokens that choose expert e, added up over the k choices, and P_e the mean of its
routing probability, both over the non-padding tokens of all layers: E times the sum of f_e P_e. It is k where
all experts are used alike. Routers are frozen here, so that it acts on what they read, through the adapter.

Shapes: N tokens, E experts, L MoE layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fedflame.moe.families import MoELayer


class LoadBalancing:
    """Records what the routers of a model say within `recorded`, and makes a loss of it.

    Its hooks stay on the routers. Where layers are compiled they are no part of a graph.
    """

    def __init__(self, layers: Sequence[MoELayer]) -> None:
        self._layers = layers
        self._logits: dict[int, Tensor] = {}
        self._recording = False
        for index, layer in enumerate(layers):
            layer.router.register_forward_hook(self._recorder(index))

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Record within the block; not when gradient checkpointing runs a layer again."""
        self._logits, self._recording = {}, True
        try:
            yield
        finally:
            self._recording = False

    def loss(self, real_tokens: Tensor | None, counted: Tensor | None) -> Tensor:
        """Return the loss of what was recorded, and forget it.

        Args:
            real_tokens: the indices of the tokens that count; None for all.
            counted: [N] 1 for every token that counts, else 0; None if all do.
        """
        logits = [self._logits[index] for index in range(len(self._layers))]
        self._logits = {}
        device, experts, k = logits[-1].device, self._layers[0].num_experts, self._layers[0].top_k
        chosen, probability, tokens = torch.zeros(3, experts, device=device)
        for of_layer in logits:
            rows = of_layer.reshape(-1, experts)
            if real_tokens is not None:
                rows = rows.index_select(0, real_tokens.to(rows.device))
            weights = rows.new_ones(len(rows), 1) if counted is None else counted.to(rows.device).unsqueeze(1)
            probabilities = rows.softmax(-1, dtype=torch.float32)
            choices = torch.zeros_like(probabilities).scatter(1, probabilities.topk(k).indices, 1.0)
            chosen = chosen + (choices * weights).sum(0).to(device)
            probability = probability + (probabilities * weights).sum(0).to(device)
            tokens = tokens + weights.sum().to(device)
        overlap: Tensor = (chosen / tokens * (probability / tokens)).sum()
        return experts * overlap

    def _recorder(self, index: int) -> Callable[..., None]:
        def record(module: nn.Module, inputs: object, output: tuple[Tensor, ...]) -> None:
            if self._recording:
                self._logits[index] = output[0]

        uncompiled: Callable[..., None] = torch.compiler.disable(record)
        return uncompiled
