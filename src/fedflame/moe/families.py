"""Find the MoE layers of a Hugging Face model, or say why there are none to train."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from fedflame.errors import UserError

FIXED_ROUTERS = ("PhimoeTopKRouter", "DeepseekV4HashRouter")
"""Routers that have a `top_k` and pick as many experts as ever when it is changed."""


@dataclass(frozen=True)
class MoELayer:
    """One MoE layer: the router decides (its `top_k` is k), the experts compute."""

    name: str
    router: nn.Module
    experts: nn.Module
    num_experts: int
    num_experts_per_tok: int
    """K, the router's own top-k at the time the layer was found."""
    hidden_size: int
    """H."""
    expert_width: int
    """I, the inner width of one expert."""


def find_moe_layers(model: nn.Module) -> list[MoELayer]:
    """The MoE layers in model order.

    An experts module is one that transformers' `use_experts_implementation` has decorated; its
    router is the sibling that owns `top_k` (names differ by family, so none is assumed).

    Raises:
        UserError: the model has no such layer, or its experts compute in a way not supported.
    """
    layers = []
    for name, block in model.named_modules():
        experts = getattr(block, "experts", None)
        if not isinstance(experts, nn.Module) or not hasattr(experts, "is_concatenated"):
            continue
        _refuse_unsupported(type(experts).__name__, experts)
        routers = [child for child in block.children() if hasattr(child, "top_k")]
        if len(routers) != 1:
            raise UserError(f"{type(block).__name__}: {len(routers)} routers with a top_k; 1 is needed")
        if type(routers[0]).__name__ in FIXED_ROUTERS:
            raise UserError(f"{type(routers[0]).__name__} does not obey its top_k: not supported")
        layers.append(_describe(name, routers[0], experts))
    if not layers:
        kind = type(model).__name__
        raise UserError(
            f"{kind} is no sparse mixture of experts that transformers routes; try an OLMoE model"
        )
    _refuse_scaled_logits(model)
    return layers


def _describe(name: str, router: nn.Module, experts: nn.Module) -> MoELayer:
    down = experts.get_parameter("down_proj")
    num_experts, hidden_size, expert_width = down.shape
    top_k = int(router.top_k)  # type: ignore[arg-type]
    return MoELayer(name, router, experts, num_experts, top_k, hidden_size, expert_width)


def _refuse_unsupported(kind: str, experts: nn.Module) -> None:
    deviations = {
        "expert biases": experts.has_bias,
        "transposed weights": experts.is_transposed,
        "no gate": not experts.has_gate,
        "interleaved gate and up rows": not experts.is_concatenated,
        "a norm after each expert": experts.has_post_expert_norm,
        "expert parallelism": experts._is_expert_parallel,
    }
    found = [reason for reason, present in deviations.items() if present]
    if found:
        raise UserError(f"{kind} has {', '.join(found)}: not supported")


def require_aligned(layers: Sequence[MoELayer]) -> None:
    """Raises UserError where rows of the expert weights are no multiple of 16 bytes, as grouped_mm needs."""
    for layer in layers:
        dtype = layer.experts.get_parameter("down_proj").dtype
        if any(size * dtype.itemsize % 16 for size in (layer.hidden_size, layer.expert_width)):
            kind, name = type(layer.experts).__name__, str(dtype).removeprefix("torch.")
            raise UserError(
                f"{kind} of hidden size {layer.hidden_size} and width {layer.expert_width}: rows in {name} "
                "are no multiple of 16 bytes, as grouped_mm needs; try model.dtype=float32"
            )


def _refuse_scaled_logits(model: nn.Module) -> None:
    # The loss applies the output embedding itself, at labelled positions only.
    config = model.config.get_text_config()  # type: ignore[operator, union-attr]
    for key in ("logits_scaling", "logit_scale", "final_logit_softcapping"):
        if getattr(config, key, None) not in (None, 1, 1.0):
            raise UserError(f"{type(model).__name__} changes its logits by {key}: not supported")
