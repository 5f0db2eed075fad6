"""Low-rank factors inside the frozen weights: W + (alpha/r) B A, in memory or for a merged checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from fedflame.messages import NOTHING, Adapter
from fedflame.moe.families import MoELayer


class MergedBase:
    """The base weights that carry LoRA, with factors merged into them and the way back.

    A copy of the pristine weights exists only while factors are merged. Factors always go into the
    pristine weights, so that a base in bfloat16 is rounded once, however many rounds have passed.

    Args:
        model: the base model, its attention projections possibly wrapped by PEFT.
        layers: its MoE layers.
        attention: names of the attention LoRA values, as in `Adapter.attention`.
        scaling: alpha / r.
    """

    def __init__(
        self, model: nn.Module, layers: Sequence[MoELayer], attention: Iterable[str], scaling: float
    ) -> None:
        self._model, self._layers, self._scaling = model, layers, scaling
        modules = sorted({name.rpartition(".")[0] for name in attention})
        self._weights = [
            layer.experts.get_parameter(name) for layer in layers for name in ("gate_up_proj", "down_proj")
        ] + [_weight(model, module) for module in modules]
        self._pristine: list[Tensor] = []
        self._merged: Adapter | None = NOTHING

    @torch.no_grad()
    def merge(self, merged: Adapter) -> None:
        """Make the weights the pristine ones plus these factors; nothing to do where they are that."""
        if self._merged is not None and _equal(self._merged, merged):
            return
        self._merged = None  # broken off on the way, the weights are neither
        if not self._pristine:
            self._pristine = [weight.clone() for weight in self._weights]
        for weight, pristine in zip(self._weights, self._pristine, strict=True):
            weight.copy_(pristine)
        if merged.tensors():
            merge_into(self._model, self._layers, merged, self._scaling, torch.ones(len(self._layers)))
        else:
            self._pristine = []
        self._merged = merged


@torch.no_grad()
def merge_into(
    model: nn.Module, layers: Sequence[MoELayer], adapter: Adapter, scaling: float, scalars: Tensor
) -> None:
    """Add scaling * B A to every weight that has factors, and multiply the down projections by s [L].

    Each sum is formed in float32 and rounded to the weight's dtype once.
    """
    for index, (layer, s) in enumerate(zip(layers, scalars, strict=True)):
        a1, b1, a2, b2 = (adapter.experts[f"{index}.{name}"] for name in ("A1", "B1", "A2", "B2"))
        r, width = a2.shape[1], layer.expert_width
        gate_up, down = (layer.experts.get_parameter(name) for name in ("gate_up_proj", "down_proj"))
        for expert in range(layer.num_experts):  # one at a time: only one expert in float32
            gate = b1[expert, :width] @ a1[expert, :r]
            up = b1[expert, width:] @ a1[expert, r:]
            gate_up[expert] = gate_up[expert].float() + scaling * torch.cat([gate, up])
            down[expert] = s * (down[expert].float() + scaling * (b2[expert] @ a2[expert]))
    for name, a in adapter.attention.items():
        if name.endswith(".A"):
            module = name.removesuffix(".A")
            weight = _weight(model, module)
            weight.copy_(weight.float() + scaling * (adapter.attention[f"{module}.B"] @ a))


def _weight(model: nn.Module, module: str) -> nn.Parameter:
    # Of a projection that PEFT has wrapped, `weight` is the frozen base's.
    return model.get_submodule(module).get_parameter("weight")


def _equal(one: Adapter, other: Adapter) -> bool:
    values, others = one.tensors(), other.tensors()
    return values.keys() == others.keys() and all(torch.equal(values[name], others[name]) for name in values)
