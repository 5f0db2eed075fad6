"""Expert LoRA: W x + c B A x for gate, up and down of every expert, in contiguous banks.

transformers 5 calls the experts of every SMoE family through `ALL_EXPERTS_FUNCTIONS`. This module registers
one function there, so that no Hugging Face model class has to be changed. PEFT's `target_parameters` is not
used, because it builds W + BA for all experts in every forward, whatever k is.

Shapes: N tokens, k active experts, E experts, H hidden, I expert width, R rank.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from fedflame.moe.activation_counts import ActivationCounts
from fedflame.moe.families import MoELayer
from fedflame.moe.fused_experts import Experts, FusedExperts
from fedflame.moe.projection import apart, joined
from fedflame.moe.rescaler import rescale
from fedflame.moe.routed_rows import tokens_of_experts
from fedflame.moe.row_norms import RowNorms

EXPERTS_IMPLEMENTATION = "fedflame"
BANKS = ("A1", "B1", "A2", "B2")


class ExpertLoRA(nn.Module):
    """The fp32 LoRA banks and the rescaler s of one MoE layer.

    Args:
        layer: the MoE layer that they belong to.
        index: its number among the MoE layers, from 0.
        r: LoRA rank.
        scale: c, the factor of every product B A.
        counts: receives the tokens of each expert in training.
        recompute: the backward computes the experts' pre-activation again; see `FusedExperts`.
        mapped: the base weights are mapped from files and stay there. Otherwise they move into one buffer
            with the LoRA values; see `moe.projection`.
    """

    def __init__(
        self,
        layer: MoELayer,
        index: int,
        r: int,
        scale: float,
        counts: ActivationCounts,
        recompute: bool = False,
        mapped: bool = False,
    ) -> None:
        super().__init__()
        self.layer = layer
        self.experts = _experts(layer, r, scale, mapped)
        self.index = index
        self.counts = counts
        self.recompute = recompute
        device = self.experts.up.weight.device
        for name, shape in layer.bank_shapes(r).items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape, device=device)))
        self.s = nn.Parameter(torch.ones((), device=device))
        self.dropout = 0.0
        self.row_norms: RowNorms | None = None
        """Records what the rows of a batch add to gradients; None unless somebody asks."""
        self._written: list[tuple[int, int]] = []

    @property
    def scaling(self) -> float:
        """The factor c of every product B A."""
        return self.experts.up.scaling

    @property
    def r(self) -> int:
        """Rank of the banks that are loaded now. The scale keeps the run's rank."""
        return self.get_parameter("A2").shape[1]

    def banks(self) -> dict[str, nn.Parameter]:
        """Return A1 [E,nR,H], B1 [E,nI,R], A2 [E,R,I] and B2 [E,H,R] by name; n is 2 with a gate, else 1."""
        return {name: self.get_parameter(name) for name in BANKS}

    def written(self) -> Experts:
        """Return the experts with the banks' values of now in their products.

        torch counts the changes of every tensor, so that values which are there already are not written
        again: a token that is generated changes none.
        """
        a1, b1, a2, b2 = banks = list(self.banks().values())
        changes = [(id(bank), bank._version) for bank in banks]
        if changes != self._written:
            self.experts.up.write(a1.detach(), b1.detach())
            self.experts.down.write(a2.detach(), b2.detach())
            self._written = changes
        return self.experts


def _experts(layer: MoELayer, r: int, scaling: float, mapped: bool) -> Experts:
    frozen, place = layer.frozen(), apart if mapped else joined
    up = place(frozen.gate_up, frozen.gate_up_bias, layer.inner_rows, r, scaling)
    down = place(frozen.down, frozen.down_bias, [slice(None)], r, scaling)
    layer.keep_weights_in(up.weight, down.weight)
    return Experts(up, down, frozen.gate)


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
    real = real.to(x.device)
    chosen = (value.index_select(0, real) for value in (x, top_k_index, top_k_weights))
    output = _real_tokens_forward(lora, *chosen)
    return torch.zeros_like(x).index_copy(0, real, output)


def _real_tokens_forward(lora: ExpertLoRA, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    banks, experts = lora.banks().values(), lora.written()
    weights, norms = rescale(top_k_weights, lora.s), lora.row_norms
    if norms is not None and lora.s.requires_grad:
        weights.register_hook(lambda d: norms.scalar(lora.s, (d * top_k_weights.detach()).sum(1)))
    options = lora.recompute, lora.dropout, norms
    output: Tensor
    output, per_expert = FusedExperts.apply(  # type: ignore[no-untyped-call]
        x, weights, *banks, top_k_index, experts, *options
    )
    if (counted := lora.counts.counted) is not None:
        per_expert = tokens_of_experts(top_k_index, counted, lora.layer.num_experts)
    lora.counts.record(lora.index, per_expert)
    return output


def leave_experts_uncompiled() -> None:
    """Keep `experts_forward` out of the graphs of compiled layers: it compiles its row passes itself."""
    ALL_EXPERTS_FUNCTIONS.register(EXPERTS_IMPLEMENTATION, torch.compiler.disable(experts_forward))


ALL_EXPERTS_FUNCTIONS.register(EXPERTS_IMPLEMENTATION, experts_forward)
