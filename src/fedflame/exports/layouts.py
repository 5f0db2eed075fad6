"""PEFT's two layouts of expert LoRA: what it calls their tensors, and how our banks become them and back.

- `per-expert`: one A and one B per projection of every expert, in the module names of the Hugging Face hub
  (`...experts.3.gate_proj`), as `target_modules` gives them for linear layers. PEFT fuses them when it loads.
- `fused`: one A and one B per stacked parameter, as `target_parameters` gives them. Gate and up are one
  parameter, hence one product: with A = [A_gate; A_up] and B block-diagonal it is ours, at twice the rank.

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
"""In the order in which every family declares them and PEFT therefore wraps them: the first is innermost."""


@dataclass(frozen=True)
class Factors:
    """A [..,R,in] and B [..,out,R] of one product B A: views, read to save and filled to load."""

    a: Tensor
    b: Tensor

    def fill(self, other: Factors, ratio: float) -> None:
        """Put `ratio` times the other product, of at most this rank, into the first ranks; the rest stays."""
        rank = other.a.shape[-2]
        self.a[..., :rank, :] = other.a
        self.b[..., :rank] = other.b.float() * ratio


@dataclass(frozen=True)
class ExpertNames:
    """What the hub calls the parts of one expert."""

    gate: str
    up: str
    down: str
    block: str | None = None
    """The MoE block, where transformers calls it otherwise."""

    @property
    def projections(self) -> tuple[str, str, str]:
        return self.gate, self.up, self.down

    def expert(self, layer: MoELayer, index: int) -> str:
        """The hub's name of one expert."""
        parent, _, block = layer.name.rpartition(".")
        return f"{parent}.{self.block or block}.experts.{index}"


EXPERT_NAMES = (
    ExpertNames("gate_proj", "up_proj", "down_proj"),
    ExpertNames("w1", "w3", "w2", "block_sparse_moe"),
)
"""The names that PEFT 0.21 turns into fused parameters: those of most families, and Mixtral's."""


def expert_factors(adapter: Adapter, layer: int) -> tuple[Factors, Factors, Factors]:
    """Gate, up and down of all experts of one MoE layer: A [E,R,in] and B [E,out,R]."""
    a1, b1, a2, b2 = (adapter.experts[f"{layer}.{bank}"] for bank in ("A1", "B1", "A2", "B2"))
    r, width = a2.shape[1:]
    return Factors(a1[:, :r], b1[:, :width]), Factors(a1[:, r:], b1[:, width:]), Factors(a2, b2)


def attention_pairs(adapter: Adapter) -> Iterator[tuple[str, Factors]]:
    """Module name and matrices of attention LoRA; both layouts have them alike."""
    for name, a in adapter.attention.items():
        module, _, letter = name.rpartition(".")
        if letter == "A":
            yield module, Factors(a, adapter.attention[f"{module}.B"])


def per_expert_pairs(
    adapter: Adapter, layers: Sequence[MoELayer], names: ExpertNames
) -> Iterator[tuple[str, Factors]]:
    """Module name and matrices of every projection of every expert."""
    for index, layer in enumerate(layers):
        factors = expert_factors(adapter, index)
        for expert in range(layer.num_experts):
            for name, stacked in zip(names.projections, factors, strict=True):
                yield f"{names.expert(layer, expert)}.{name}", Factors(stacked.a[expert], stacked.b[expert])


def fused_pairs(adapter: Adapter, layers: Sequence[MoELayer]) -> Iterator[tuple[str, Factors]]:
    """Wrapper name and packed matrices of both parameters of every layer, gate and up at rank 2R."""
    for index, layer in enumerate(layers):
        gate, up, down = expert_factors(adapter, index)
        for wrapper, parameter in wrappers(f"{layer.name}.experts", FUSED_PARAMETERS).items():
            yield wrapper, pack(_joined(gate, up) if parameter == GATE_UP else down)


def wrappers(experts: str, parameters: Sequence[str]) -> dict[str, str]:
    """PEFT's name of each wrapper around an experts module -> the parameter that it adapts."""
    depth = len(parameters) - 1
    return {f"{experts}{'.base_layer' * (depth - i)}": name for i, name in enumerate(parameters)}


def pack(stacked: Factors) -> Factors:
    """A [E,R,in] as [E*R,in], the expert slowest; B [E,out,R] as [out,R*E], the expert fastest."""
    return Factors(stacked.a.flatten(0, 1), stacked.b.permute(1, 2, 0).flatten(1))


def unpack(packed: Factors, experts: int) -> Factors:
    """The inverse of `pack`."""
    b = packed.b.unflatten(1, (-1, experts)).permute(2, 0, 1)
    return Factors(packed.a.unflatten(0, (experts, -1)), b)


def split(fused: Factors, separate: bool) -> tuple[Factors, Factors]:
    """Gate and up of a fused product: each with half of its ranks, or each with all of them."""
    width, r = fused.b.shape[1] // 2, fused.a.shape[1]
    half = r // 2 if separate else r
    gate = Factors(fused.a[:, :half], fused.b[:, :width, :half])
    return gate, Factors(fused.a[:, r - half :], fused.b[:, width:, r - half :])


def is_separate(b: Tensor, rank: int) -> bool:
    """Whether a fused B [2I,R*E] is block-diagonal for every expert, so that gate and up share no rank."""
    if b.dim() != 2 or b.shape[1] % rank:
        return False
    ranks, width, half = b.unflatten(1, (rank, -1)), len(b) // 2, rank // 2
    return not ranks[:width, half:].any() and not ranks[width:, :half].any()


def _joined(gate: Factors, up: Factors) -> Factors:
    experts, width, r = gate.b.shape
    b = gate.b.new_zeros(experts, 2 * width, 2 * r)
    b[:, :width, :r], b[:, width:, r:] = gate.b, up.b
    return Factors(torch.cat([gate.a, up.a], dim=1), b)
