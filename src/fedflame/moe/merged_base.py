"""Merge low-rank factors into the frozen weights, W + c B A, for a run or for an exported model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from fedflame.messages import NOTHING, Adapter
from fedflame.moe.families import MoELayer


class MergedBase:
    """Merges factors into the base weights that carry LoRA, and restores the original weights.

    Factors are always added to the original weights, so that a base in bfloat16 is rounded only once, however
    many rounds have passed. A copy of the original weights exists only while factors are merged.

    Args:
        model: the base model, its attention projections possibly wrapped by PEFT.
        layers: its MoE layers.
        attention: names of the attention LoRA values, as in `Adapter.attention`.
        scaling: c, the factor of every product B A.
    """

    def __init__(
        self, model: nn.Module, layers: Sequence[MoELayer], attention: Iterable[str], scaling: float
    ) -> None:
        self._model, self._layers, self._scaling = model, layers, scaling
        self._modules = sorted({name.rpartition(".")[0] for name in attention})
        self._pristine: list[Tensor] = []
        self._merged: Adapter | None = NOTHING

    @torch.no_grad()
    def merge(self, merged: Adapter) -> None:
        """Set the weights to the original weights plus these factors; do nothing if they are that already."""
        if self._merged is not None and _equal(self._merged, merged):
            return
        self._merged = None  # if an exception interrupts the merge, the content of the weights is unknown
        weights = self._weights()
        if not self._pristine:
            self._pristine = [weight.to("cpu", copy=True) for weight in weights]  # a GPU may have no room
        for weight, pristine in zip(weights, self._pristine, strict=True):
            weight.copy_(pristine)
        if merged.tensors():
            merge_into(self._model, self._layers, merged, self._scaling, torch.ones(len(self._layers)))
        else:
            self._pristine = []
        self._merged = merged

    def _weights(self) -> list[Tensor]:
        frozen = [layer.frozen() for layer in self._layers]
        experts = [weight for layer in frozen for weight in (layer.gate_up, layer.down)]
        return experts + [_weight(self._model, module) for module in self._modules]


@torch.no_grad()
def merge_into(
    model: nn.Module, layers: Sequence[MoELayer], adapter: Adapter, scaling: float, scalars: Tensor
) -> None:
    """Add scaling * B A to every weight that has factors, and multiply the experts' output by `scalars` [L].

    Each sum is computed in float32 and rounded to the weight's dtype once.
    """
    for index, (layer, s) in enumerate(zip(layers, scalars, strict=True)):
        frozen = layer.frozen()
        banks = (adapter.experts[f"{index}.{name}"] for name in ("A1", "B1", "A2", "B2"))
        a1, b1, a2, b2 = (bank.to(frozen.down.device) for bank in banks)
        r, width = a2.shape[1], layer.expert_width
        for expert in range(layer.num_experts):  # one at a time, so that only one expert is in float32
            factors = zip(layer.inner_rows, b1[expert].split(width), a1[expert].split(r), strict=True)
            for rows, b, a in factors:
                part = frozen.gate_up[expert, rows]
                part.copy_(part.float() + scaling * (b @ a))
            frozen.down[expert] = s * (frozen.down[expert].float() + scaling * (b2[expert] @ a2[expert]))
        if frozen.down_bias is not None:
            frozen.down_bias.copy_(s * frozen.down_bias.float())
    for name, a in adapter.attention.items():
        if name.endswith(".A"):
            module = name.removesuffix(".A")
            weight = _weight(model, module)
            product = (adapter.attention[f"{module}.B"] @ a).to(weight.device)
            weight.copy_(weight.float() + scaling * product)


def _weight(model: nn.Module, module: str) -> nn.Parameter:
    # In a projection that PEFT has wrapped, `weight` is the frozen base weight.
    return model.get_submodule(module).get_parameter("weight")


def _equal(one: Adapter, other: Adapter) -> bool:
    values, others = one.tensors(), other.tensors()
    return values.keys() == others.keys() and all(torch.equal(values[name], others[name]) for name in values)
