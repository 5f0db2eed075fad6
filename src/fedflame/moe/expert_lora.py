"""Expert LoRA: W x + (alpha/r) B A x for gate, up and down of every expert, in contiguous banks.

transformers 5 routes every SMoE family through `ALL_EXPERTS_FUNCTIONS`; one function registered
there is the whole seam, and the Hugging Face model class stays as it is. PEFT's `target_parameters`
is not used: it builds W + BA for all experts on every forward, whatever k is.

Shapes: N tokens, k active experts, S = N*k routed rows, E experts, H hidden, I expert width, R rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import grouped_mm, pad
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from fedflame.moe.activation_counts import ActivationCounts
from fedflame.moe.families import MoELayer
from fedflame.moe.rescaler import rescale

EXPERTS_IMPLEMENTATION = "fedflame"
BANKS = ("A1", "B1", "A2", "B2")


class ExpertLoRA(nn.Module):
    """The banks of one MoE layer (fp32 master), its rescaler s, and where its counts go."""

    def __init__(
        self, layer: MoELayer, index: int, r: int, lora_alpha: float, counts: ActivationCounts
    ) -> None:
        super().__init__()
        experts, hidden, width = layer.num_experts, layer.hidden_size, layer.expert_width
        self.r = r
        self.scaling = lora_alpha / r
        self.index = index
        self.counts = counts
        self.A1 = nn.Parameter(torch.zeros(experts, 2 * r, hidden))
        self.B1 = nn.Parameter(torch.zeros(experts, 2 * width, r))
        self.A2 = nn.Parameter(torch.zeros(experts, r, width))
        self.B2 = nn.Parameter(torch.zeros(experts, hidden, r))
        self.s = nn.Parameter(torch.ones(()))

    def banks(self) -> dict[str, nn.Parameter]:
        return {name: self.get_parameter(name) for name in BANKS}


def initial_banks(layer: MoELayer, r: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Each A uniform in +-1/sqrt(fan-in) as PEFT draws it, each B zero: the adapter starts at nothing."""
    experts, hidden, width = layer.num_experts, layer.hidden_size, layer.expert_width

    def uniform(rows: int, fan_in: int) -> Tensor:
        bound = 1 / math.sqrt(fan_in)
        return torch.empty(experts, rows, fan_in).uniform_(-bound, bound, generator=generator)

    return {
        "A1": uniform(2 * r, hidden),
        "B1": torch.zeros(experts, 2 * width, r),
        "A2": uniform(r, width),
        "B2": torch.zeros(experts, hidden, r),
    }


@dataclass(frozen=True)
class RoutedRows:
    """How N*k routed rows are sorted by expert and back."""

    order: Tensor
    inverse: Tensor
    offsets: Tensor

    @classmethod
    def sort(cls, top_k_index: Tensor, num_experts: int) -> RoutedRows:
        flat = top_k_index.reshape(-1)
        order = torch.argsort(flat, stable=True)
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(order.numel(), device=order.device)
        per_expert = torch.bincount(flat, minlength=num_experts)
        return cls(order, inverse, torch.cumsum(per_expert, 0).to(torch.int32))


def experts_forward(experts: nn.Module, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The registered experts function: count, rescale, then base plus low-rank path. [N,H] -> [N,H]."""
    lora: ExpertLoRA = experts.fedflame  # type: ignore[assignment]
    lora.counts.record(lora.index, top_k_index)
    weights = rescale(top_k_weights, lora.s)
    k = top_k_index.shape[1]
    rows = RoutedRows.sort(top_k_index, lora.A1.shape[0])
    # A permutation of expanded rows, not a gather: its gradient adds each row once, so the sum over
    # k is a fixed-order reduction and the same run gives the same bytes.
    routed = x.unsqueeze(1).expand(-1, k, -1).reshape(-1, x.shape[1])[rows.order]
    output = _expert_outputs(experts, lora, routed, rows.offsets)
    weighted = output * weights.reshape(-1)[rows.order].unsqueeze(1)
    return weighted[rows.inverse].view(x.shape[0], k, -1).sum(1).to(x.dtype)


def _expert_outputs(experts: nn.Module, lora: ExpertLoRA, routed: Tensor, offsets: Tensor) -> Tensor:
    """Composed path: each routed row [S,H] through its expert with LoRA, [S,H]."""
    a1, b1, a2, b2 = _aligned_banks(lora, routed.dtype)
    r, width = a2.shape[1], b1.shape[1] // 2
    low = _grouped_linear(routed, a1, offsets)
    low_gate_up = torch.cat(
        [
            _grouped_linear(low[:, :r].contiguous(), b1[:, :width], offsets),
            _grouped_linear(low[:, r:].contiguous(), b1[:, width:], offsets),
        ],
        dim=1,
    )
    gate_up = (
        _grouped_linear(routed, experts.get_parameter("gate_up_proj"), offsets) + lora.scaling * low_gate_up
    )
    hidden = experts._apply_gate(gate_up)  # type: ignore[operator]
    low_down = _grouped_linear(_grouped_linear(hidden, a2, offsets), b2, offsets)
    return _grouped_linear(hidden, experts.get_parameter("down_proj"), offsets) + lora.scaling * low_down


def _aligned_banks(lora: ExpertLoRA, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The banks in the compute dtype, their rank filled up with zeros to rows of 16 bytes.

    grouped_mm refuses other strides; the zeros change no product.
    """
    a1, b1, a2, b2 = (bank.to(dtype) for bank in lora.banks().values())
    spare = -lora.r % (16 // dtype.itemsize)
    if spare == 0:
        return a1, b1, a2, b2
    gate_and_up = a1.unflatten(1, (2, lora.r))
    return (
        pad(gate_and_up, (0, 0, 0, spare)).flatten(1, 2),
        pad(b1, (0, spare)),
        pad(a2, (0, 0, 0, spare)),
        pad(b2, (0, spare)),
    )


def _grouped_linear(rows: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    """Rows [S,in], sorted by expert, times weights [E,out,in] of their expert: [S,out]."""
    return grouped_mm(rows, weights.transpose(1, 2), offs=offsets)


ALL_EXPERTS_FUNCTIONS.register(EXPERTS_IMPLEMENTATION, experts_forward)
