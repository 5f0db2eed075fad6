"""Gradient checkpointing: the backward recomputes values instead of keeping them, with the same bits.

Chen et al.: Training Deep Nets with Sublinear Memory Cost, arXiv 1604.06174. The setting `layers` keeps only
the input of each layer. The setting `experts` drops only the experts' pre-activation, which is the largest
part (`fused_experts.FusedExperts`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from fedflame.errors import UserError


def checkpointable_layers(model: nn.Module) -> list[GradientCheckpointingLayer]:
    """Return the decoder layers, as far as transformers can checkpoint them."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def require_checkpointable(model: nn.Module) -> None:
    """Raise UserError if the model has no layer that transformers can checkpoint."""
    if not checkpointable_layers(model):
        kind = type(model).__name__
        raise UserError(f"training.gradient_checkpointing: transformers checkpoints no layer of {kind}")


@contextmanager
def layers_checkpointed(model: nn.Module) -> Iterator[None]:
    """Checkpoint every layer of `checkpointable_layers` within the block; the result is bit-identical.

    transformers checkpoints a layer only if the layer's own `training` flag is set. The flags of the modules
    inside it stay unset, so that no dropout begins.
    """
    layers, run_again = checkpointable_layers(model), partial(checkpoint, use_reentrant=False)
    for layer in layers:
        layer.gradient_checkpointing = layer.training = True
        layer._gradient_checkpointing_func = run_again
    try:
        yield
    finally:
        for layer in layers:
            layer.gradient_checkpointing = layer.training = False
