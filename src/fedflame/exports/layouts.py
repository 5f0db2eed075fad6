"""PEFT's two layouts of expert LoRA: their tensor names, and the conversion from and to our banks.

- `per-expert`: one A and one B per projection of every expert, under the module names of the Hugging Face hub
  (`...experts.3.gate_proj`), as PEFT's `target_modules` names linear layers. PEFT fuses them when it loads.
- `fused`: one A and one B per stacked parameter, as in PEFT's `target_parameters`. Gate and up are one
  parameter and so have one product. With A = [A_gate; A_up] and a block-diagonal B, at twice the rank, it
  equals ours.

Shapes: E experts, H hidden, I expert width, R rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fedflame.messages import Adapter
from fedflame.moe.families import MoELayer

Layout = Literal["per-expert", "fused"]

GATE_UP, DOWN = "gate_up_proj", "down_proj"
FUSED_PARAMETERS = (GATE_UP, DOWN)
"""In the order in which all families declare them, and so PEFT wraps them; the first is innermost."""


@dataclass(frozen=True)
class Factors:
    """A [..,R,in] and B [..,out,R] of one product B A, as views: saving reads them, loading fills them."""

    a: Tensor
    b: Tensor

    def fill(self, other: Factors, ratio: float) -> None:
        """Copy `ratio` times another product, of at most this rank, into the first ranks; keep the others."""
        rank = other.a.shape[-2]
        self.a[..., :rank, :] = other.a
        self.b[..., :rank] = other.b.float() * ratio


@dataclass(frozen=True)
class ExpertNames:
    """The hub's names of the parts of an expert."""

    gate: str
    up: str
    down: str
    block: str | None = None
    """The hub's name of the MoE block; None if it is the same in transformers."""

    @property
    def projections(self) -> tuple[str, str, str]:
        return self.gate, self.up, self.down

    def expert(self, layer: MoELayer, index: int) -> str:
        """Return the hub's name of one expert."""
        parent, _, block = layer.name.rpartition(".")
        return f"{parent}.{self.block or block}.experts.{index}"


EXPERT_NAMES = (
    ExpertNames("gate_proj", "up_proj", "down_proj"),
    ExpertNames("w1", "w3", "w2", "block_sparse_moe"),
)
"""The names that PEFT 0.21 converts to fused parameters: those of most families, and Mixtral's."""


def expert_factors(adapter: Adapter, layer: int) -> tuple[Factors, Factors, Factors]:
    """Return gate, up and down of all experts of one MoE layer: A [E,R,in] and B [E,out,R]."""
    a1, b1, a2, b2 = (adapter.experts[f"{layer}.{bank}"] for bank in ("A1", "B1", "A2", "B2"))
    r, width = a2.shape[1:]
    return Factors(a1[:, :r], b1[:, :width]), Factors(a1[:, r:], b1[:, width:]), Factors(a2, b2)


def attention_pairs(adapter: Adapter) -> Iterator[tuple[str, Factors]]:
    """Yield module name and matrices of attention LoRA, which is the same in both layouts."""
    for name, a in adapter.attention.items():
        module, _, letter = name.rpartition(".")
        if letter == "A":
            yield module, Factors(a, adapter.attention[f"{module}.B"])


def per_expert_pairs(
    adapter: Adapter, layers: Sequence[MoELayer], names: ExpertNames
) -> Iterator[tuple[str, Factors]]:
    """Yield module name and matrices of every projection of every expert."""
    for index, layer in enumerate(layers):
        factors = expert_factors(adapter, index)
        for expert in range(layer.num_experts):
            for name, stacked in zip(names.projections, factors, strict=True):
                yield f"{names.expert(layer, expert)}.{name}", Factors(stacked.a[expert], stacked.b[expert])


def fused_pairs(adapter: Adapter, layers: Sequence[MoELayer]) -> Iterator[tuple[str, Factors]]:
    """Yield wrapper name and packed matrices of both parameters of every layer; gate and up have rank 2R."""
    for index, layer in enumerate(layers):
        gate, up, down = expert_factors(adapter, index)
        for wrapper, parameter in wrappers(f"{layer.name}.experts", FUSED_PARAMETERS).items():
            yield wrapper, pack(_joined(gate, up) if parameter == GATE_UP else down)


def wrappers(experts: str, parameters: Sequence[str]) -> dict[str, str]:
    """Return PEFT's wrapper name -> the parameter that it adapts, for one experts module."""
    depth = len(parameters) - 1
    return {f"{experts}{'.base_layer' * (depth - i)}": name for i, name in enumerate(parameters)}


def pack(stacked: Factors) -> Factors:
    """Flatten A [E,R,in] to [E*R,in], expert outermost, and B [E,out,R] to [out,R*E], expert innermost."""
    return Factors(stacked.a.flatten(0, 1), stacked.b.permute(1, 2, 0).flatten(1))


def unpack(packed: Factors, experts: int) -> Factors:
    """Undo `pack`."""
    b = packed.b.unflatten(1, (-1, experts)).permute(2, 0, 1)
    return Factors(packed.a.unflatten(0, (experts, -1)), b)


def split(fused: Factors, separate: bool) -> tuple[Factors, Factors]:
    """Split a fused product into gate and up: each gets half of the ranks if `separate`, else all of them."""
    width, r = fused.b.shape[1] // 2, fused.a.shape[1]
    half = r // 2 if separate else r
    gate = Factors(fused.a[:, :half], fused.b[:, :width, :half])
    return gate, Factors(fused.a[:, r - half :], fused.b[:, width:, r - half :])


def is_separate(b: Tensor, rank: int) -> bool:
    """Return whether a fused B [2I,R*E] is block-diagonal in every expert: gate and up share no rank."""
    if b.dim() != 2 or b.shape[1] % rank:
        return False
    ranks, width, half = b.unflatten(1, (rank, -1)), len(b) // 2, rank // 2
    return not ranks[:width, half:].any() and not ranks[width:, :half].any()


def _joined(gate: Factors, up: Factors) -> Factors:
    experts, width, r = gate.b.shape
    b = gate.b.new_zeros(experts, 2 * width, 2 * r)
    b[:, :width, :r], b[:, width:, r:] = gate.b, up.b
    return Factors(torch.cat([gate.a, up.a], dim=1), b)
