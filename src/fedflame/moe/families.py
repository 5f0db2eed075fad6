"""Find the MoE layers of a Hugging Face model, or say why it cannot be trained.

transformers' `use_experts_implementation` describes how the experts of each family compute. Only this file
knows the differences between families; the rest of the library uses `MoELayer` and `FrozenExperts`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers.integrations.moe import _default_apply_gate

from fedflame.cost.refused_families import refusal
from fedflame.errors import UserError
from fedflame.moe.row_passes import Gate, gated

CONFIGURED_ROUTERS = {"Gemma4TextRouter": "top_k_experts"}
"""Router class -> config key, for routers without `top_k`: they read k from this key in every forward."""


@dataclass(frozen=True)
class FrozenExperts:
    """The frozen expert weights of an MoE layer, and its activation."""

    gate_up: Tensor
    """[E,nI,H]"""
    down: Tensor
    """[E,H,I]"""
    gate_up_bias: Tensor | None
    """[E,nI]"""
    down_bias: Tensor | None
    """[E,H]"""
    gate: Gate


@dataclass(frozen=True)
class MoELayer:
    """One MoE layer: its router, its experts and their sizes."""

    name: str
    router: nn.Module
    experts: nn.Module
    num_experts: int
    num_experts_per_tok: int
    """K: the router's top-k when the layer was found."""
    hidden_size: int
    """H: the width of the experts' input and output."""
    expert_width: int
    """I: the inner width of one expert."""

    @property
    def top_k(self) -> int:
        """The number of experts that the router picks per token now."""
        owner, key = _top_k_place(self.router)
        return int(getattr(owner, key))

    def set_top_k(self, k: int) -> None:
        """Let the router pick k experts. In most families a change of the model's config would do nothing."""
        owner, key = _top_k_place(self.router)
        setattr(owner, key, k)

    @property
    def inner_projections(self) -> int:
        """n: the number of projections before the activation; 2 (gate and up) or 1 (up)."""
        return 2 if self.experts.has_gate else 1

    def frozen(self) -> FrozenExperts:
        """Return the base weights as views [E,out,in], however the family stores them, and its activation."""
        inner, gate = self._inner, self._gate()
        return FrozenExperts(
            self._weight(inner), self._weight("down_proj"), self._bias(inner), self._bias("down_proj"), gate
        )

    def _gate(self) -> Gate:
        experts: Any = self.experts
        if not experts.has_gate:
            return Gate(experts.act_fn)
        if type(experts)._apply_gate is _default_apply_gate:
            return Gate(partial(gated, experts.act_fn), parts=2)
        return Gate(experts._apply_gate)

    def keep_weights_in(self, gate_up: Tensor, down: Tensor) -> None:
        """Make the base weights views of these tensors [E,nI,H] and [E,H,I], which hold the same values."""
        for name, held in ((self._inner, gate_up), ("down_proj", down)):
            self.experts.get_parameter(name).data = held.mT if self.experts.is_transposed else held

    @property
    def inner_rows(self) -> list[slice]:
        """For gate and up, or for up alone, its rows of `gate_up`; some families alternate the two."""
        if not self.experts.has_gate:
            return [slice(None)]
        if self.experts.is_concatenated:
            return [slice(0, self.expert_width), slice(self.expert_width, None)]
        return [slice(0, None, 2), slice(1, None, 2)]

    @property
    def _inner(self) -> str:
        return "gate_up_proj" if self.experts.has_gate else "up_proj"

    def _weight(self, name: str) -> Tensor:
        weight = self.experts.get_parameter(name)
        return weight.mT if self.experts.is_transposed else weight

    def _bias(self, name: str) -> Tensor | None:
        return self.experts.get_parameter(f"{name}_bias") if self.experts.has_bias else None

    def bank_shapes(self, r: int) -> dict[str, tuple[int, int, int]]:
        """Return the shapes of the LoRA banks at rank r; see `messages.Adapter`."""
        experts, hidden, width, n = (
            self.num_experts,
            self.hidden_size,
            self.expert_width,
            self.inner_projections,
        )
        return {
            "A1": (experts, n * r, hidden),
            "B1": (experts, n * width, r),
            "A2": (experts, r, width),
            "B2": (experts, hidden, r),
        }


def find_moe_layers(model: nn.Module) -> list[MoELayer]:
    """Return the MoE layers in model order.

    An experts module is one that transformers' `use_experts_implementation` has decorated. Its router is the
    sibling module that has a top-k; the module names differ between families, so they are not used.

    Raises:
        UserError: the model has no such layer, or its routing or its experts are not supported.
    """
    refused = refusal(model.config.get_text_config().model_type)  # type: ignore[union-attr, operator]
    if refused:
        raise UserError(refused)
    layers = []
    for name, block in model.named_modules():
        experts = getattr(block, "experts", None)
        if not isinstance(experts, nn.Module) or not hasattr(experts, "is_concatenated"):
            continue
        _refuse_unsupported(type(experts).__name__, experts)
        layers.append(_describe(name, _router_of(block), experts))
    if not layers:
        kind = type(model).__name__
        raise UserError(
            f"{kind} is no sparse mixture of experts that transformers routes; try an OLMoE model"
        )
    if len({layer.num_experts for layer in layers}) > 1:
        raise UserError(
            f"{type(model).__name__} has layers that differ in their number of experts: not supported"
        )
    return layers


def _router_of(block: nn.Module) -> nn.Module:
    routers = [
        child
        for child in block.children()
        if hasattr(child, "top_k") or type(child).__name__ in CONFIGURED_ROUTERS
    ]
    if len(routers) != 1:
        raise UserError(f"{type(block).__name__}: {len(routers)} routers with a top_k; 1 is needed")
    return routers[0]


def _top_k_place(router: nn.Module) -> tuple[object, str]:
    key = CONFIGURED_ROUTERS.get(type(router).__name__)
    return (router.config, key) if key else (router, "top_k")


def _describe(name: str, router: nn.Module, experts: nn.Module) -> MoELayer:
    num_experts, hidden_size, expert_width = experts.get_parameter("down_proj").shape
    if experts.is_transposed:
        hidden_size, expert_width = expert_width, hidden_size
    owner, key = _top_k_place(router)
    return MoELayer(name, router, experts, num_experts, int(getattr(owner, key)), hidden_size, expert_width)


def _refuse_unsupported(kind: str, experts: nn.Module) -> None:
    deviations = {
        "a norm after each expert": experts.has_post_expert_norm,
        "expert parallelism": experts._is_expert_parallel,
    }
    found = [reason for reason, present in deviations.items() if present]
    if found:
        raise UserError(f"{kind} has {', '.join(found)}: not supported")


def require_aligned(layers: Sequence[MoELayer]) -> None:
    """Raise UserError if a row of the expert weights is no multiple of 16 bytes, as grouped_mm needs."""
    for layer in layers:
        dtype = layer.experts.get_parameter("down_proj").dtype
        if any(size * dtype.itemsize % 16 for size in (layer.hidden_size, layer.expert_width)):
            kind, name = type(layer.experts).__name__, str(dtype).removeprefix("torch.")
            raise UserError(
                f"{kind} of hidden size {layer.hidden_size} and width {layer.expert_width}: rows in {name} "
                "are no multiple of 16 bytes, as grouped_mm needs; try model.dtype=float32"
            )
