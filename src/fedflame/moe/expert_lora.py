"""Expert LoRA: W x + (alpha/r) B A x for gate, up and down of every expert, in contiguous banks.

transformers 5 calls the experts of every SMoE family through `ALL_EXPERTS_FUNCTIONS`. This module registers
one function there, so that no Hugging Face model class has to be changed. PEFT's `target_parameters` is not
used, because it builds W + BA for all experts in every forward, whatever k is.

Shapes: N tokens, k active experts, E experts, H hidden, I expert width, R rank.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from fedflame.moe.activation_counts import ActivationCounts
from fedflame.moe.families import MoELayer
from fedflame.moe.fused_experts import FusedExperts
from fedflame.moe.rescaler import rescale
from fedflame.moe.routed_rows import RoutedRows

EXPERTS_IMPLEMENTATION = "fedflame"
BANKS = ("A1", "B1", "A2", "B2")


class ExpertLoRA(nn.Module):
    """The fp32 LoRA banks and the rescaler s of one MoE layer.

    Args:
        layer: the MoE layer that they belong to.
        index: its number among the MoE layers, from 0.
        r: LoRA rank.
        lora_alpha: the product B A is scaled by lora_alpha / r.
        counts: receives the tokens of each expert in training.
        recompute: the backward computes the experts' pre-activation again; see `FusedExperts`.
    """

    def __init__(
        self,
        layer: MoELayer,
        index: int,
        r: int,
        lora_alpha: float,
        counts: ActivationCounts,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        self.layer = layer
        self.scaling = lora_alpha / r
        self.index = index
        self.counts = counts
        self.recompute = recompute
        for name, shape in layer.bank_shapes(r).items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))
        self.s = nn.Parameter(torch.ones(()))

    @property
    def r(self) -> int:
        """Rank of the banks that are loaded now. The scale keeps the run's rank."""
        return self.get_parameter("A2").shape[1]

    def banks(self) -> dict[str, nn.Parameter]:
        """Return A1 [E,nR,H], B1 [E,nI,R], A2 [E,R,I] and B2 [E,H,R] by name; n is 2 with a gate, else 1."""
        return {name: self.get_parameter(name) for name in BANKS}


def initial_banks(layer: MoELayer, r: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Draw each A uniformly in +-1/sqrt(fan-in), as PEFT does. Each B is zero, so B A is zero at first."""
    banks = {name: torch.zeros(shape) for name, shape in layer.bank_shapes(r).items()}
    for name in ("A1", "A2"):
        bound = 1 / math.sqrt(banks[name].shape[2])
        banks[name].uniform_(-bound, bound, generator=generator)
    return banks


def experts_forward(experts: nn.Module, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Compute base experts plus LoRA for x [N,H] -> [N,H]; transformers calls it for every MoE layer.

    It also counts the tokens of each expert and applies the rescaler. In a training step padding tokens are
    not computed: their output is zero, and no loss depends on it.

    Args:
        experts: the experts module, with its `ExpertLoRA` as `fedflame`.
        x: [N,H] the layer's input.
        top_k_index: [N,k] the experts of each token.
        top_k_weights: [N,k] their routing weights.
    """
    lora: ExpertLoRA = experts.fedflame  # type: ignore[assignment]
    real = lora.counts.real_tokens
    if real is None:
        return _real_tokens_forward(lora, x, top_k_index, top_k_weights)
    chosen = (value.index_select(0, real) for value in (x, top_k_index, top_k_weights))
    output = _real_tokens_forward(lora, *chosen)
    return torch.zeros_like(x).index_copy(0, real, output)


def _real_tokens_forward(lora: ExpertLoRA, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    rows = RoutedRows.sort(top_k_index, lora.layer.num_experts)
    lora.counts.record(lora.index, rows.per_expert)
    output: Tensor = FusedExperts.apply(  # type: ignore[no-untyped-call]
        x,
        rescale(top_k_weights, lora.s),
        *lora.banks().values(),
        partial(_prepare_banks, lora.layer, lora.r),
        lora.layer.frozen(),
        lora.scaling,
        rows,
        lora.recompute,
    )
    return output


def _prepare_banks(layer: MoELayer, rank: int, banks: list[Tensor]) -> list[Tensor]:
    """Bring A1, B1, A2 and B2 into the form that `FusedExperts` multiplies: B1 becomes block-diagonal.

    grouped_mm needs rows of a multiple of 16 bytes, so the rank is padded with zeros, which change no
    product.
    """
    a1, b1, a2, b2 = banks
    n, width = layer.inner_projections, layer.expert_width
    spare = -rank % (16 // a1.dtype.itemsize)
    filled = rank + spare
    side_by_side = torch.cat(
        [
            pad(rows, (i * filled, (n - 1 - i) * filled + spare))
            for i, rows in enumerate(b1.split(width, dim=1))
        ],
        dim=1,
    )
    if spare:
        a1 = pad(a1.unflatten(1, (n, rank)), (0, 0, 0, spare)).flatten(1, 2)
        a2, b2 = pad(a2, (0, 0, 0, spare)), pad(b2, (0, spare))
    return [a1, layer.in_stored_order(side_by_side), a2, b2]


ALL_EXPERTS_FUNCTIONS.register(EXPERTS_IMPLEMENTATION, experts_forward)
