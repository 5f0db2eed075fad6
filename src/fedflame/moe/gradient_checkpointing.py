"""Gradient checkpointing: less is kept for the backward, which computes it again, to the same bits.

Chen et al.: Training Deep Nets with Sublinear Memory Cost, arXiv 1604.06174. Of `layers` only the input is
kept; of `experts` all but their pre-activation, the largest part of it (`fused_experts.FusedExperts`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from fedflame.errors import UserError


def checkpointed_layers(model: nn.Module) -> list[GradientCheckpointingLayer]:
    """The layers that transformers can compute again.

    Raises:
        UserError: the model has none.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        kind = type(model).__name__
        raise UserError(f"training.gradient_checkpointing: transformers checkpoints no layer of {kind}")
    return layers


@contextmanager
def layers_checkpointed(model: nn.Module) -> Iterator[None]:
    """Within the block every such layer is checkpointed; the result has the same bits.

    transformers asks the layer itself whether it trains. Only that flag is set, not those of the modules
    in it, where dropout would begin.
    """
    layers, run_again = checkpointed_layers(model), partial(checkpoint, use_reentrant=False)
    for layer in layers:
        layer.gradient_checkpointing = layer.training = True
        layer._gradient_checkpointing_func = run_again  # type: ignore[assignment]
    try:
        yield
    finally:
        for layer in layers:
            layer.gradient_checkpointing = layer.training = False
