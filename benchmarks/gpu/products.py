"""Grouped products alone: what the columns for LoRA cost, and our Triton products beside torch's.

Shapes: S rows sorted by expert, E experts, H hidden, I expert width, R rank. A wide operand is a view of a
buffer as in `fedflame.moe.projection`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from findings import Findings
from sizes import ACTIVE, Sizes
from torch import Tensor
from torch.nn.functional import grouped_mm

from fedflame.bench.block import Geometry
from fedflame.bench.measurement import median_seconds
from fedflame.bench.step import product_flops
from fedflame.moe.routed_rows import RoutedRows


@dataclass(frozen=True)
class Product:
    name: str
    left: Tensor
    """[S,a]"""
    right: Tensor
    """Weights [E,a,b], or rows [S,b] for the gradient of a bank [E,a,b]."""
    triton: bool = False
    """Whether Triton's is measured, too."""

    @property
    def flops(self) -> float:
        return 2 * self.left.numel() * self.right.shape[-1]

    def by_torch(self, offsets: Tensor) -> Tensor:
        return grouped_mm(self.left if self.right.dim() == 3 else self.left.mT, self.right, offs=offsets)

    def by_triton(self, offsets: Tensor) -> Tensor:
        from fedflame.moe import triton_products

        run = triton_products.times if self.right.dim() == 3 else triton_products.outer
        return run(self.left, self.right, offsets)


def measure(sizes: Sizes, findings: Findings) -> None:
    geometry = sizes.geometry
    ceiling = product_flops(sizes.device, sizes.product)
    for tokens in sizes.tokens:
        for k in (ACTIVE[0], ACTIVE[-1]):
            offsets = balanced_offsets(tokens, k, geometry)
            for product in products(tokens * k, geometry):
                runs = {"torch": product.by_torch}
                if product.triton and sizes.device == "cuda":
                    runs["triton"] = product.by_triton
                for by, run in runs.items():
                    with findings.attempt(f"{product.name}, {tokens} tokens, k = {k}, by {by}"):
                        taken = median_seconds(partial(run, offsets), sizes.device, sizes.repeats)
                        rate = product.flops / taken
                        size = {"tokens": tokens, "active_experts": k, "product": product.name, "by": by}
                        findings.add("products", **size, seconds=taken, of_ceiling=rate / ceiling)


def balanced_offsets(tokens: int, k: int, geometry: Geometry) -> Tensor:
    """Every token chooses k experts at random."""
    generator = torch.Generator().manual_seed(tokens)
    chosen = torch.rand(tokens, geometry.num_experts, generator=generator).topk(k).indices
    return RoutedRows.sort(chosen.to(geometry.device), geometry.num_experts).offsets


def products(count: int, geometry: Geometry) -> Iterator[Product]:
    """Those of one block with so many rows, forward and backward, and wider ones."""
    hidden, width, rank = geometry.hidden_size, geometry.intermediate_size, geometry.r
    inner, low = 2 * width, 2 * rank
    for name, into, out, room in (("gate_up", hidden, inner, low), ("down", width, hidden, rank)):
        for pad in (0, room, 64):
            rows, weights = normal(geometry, count, into + pad), buffer(geometry, out, into, pad)
            yield Product(f"{name}, {into + pad} deep", rows, weights[:, :out].mT, pad == room)
    x, d_inner = normal(geometry, count, hidden + low), normal(geometry, count, inner + low)
    weights = buffer(geometry, inner, hidden, low)
    yield Product(f"gate_up back, {inner + low} deep", d_inner, weights[:, :, :hidden], True)
    yield Product(f"A1, {low} wide", x[:, :hidden], weights[:, inner:, :hidden].mT, True)
    yield Product(f"A2, {rank} wide", x[:, :width], weights[:, inner : inner + rank, :width].mT)
    yield Product(f"B1 back, {low} wide", d_inner[:, :inner], weights[:, :inner, hidden:])
    yield Product(f"gradient of A1, {low} high", d_inner[:, inner:], x[:, :hidden], True)
    yield Product(f"gradient of B1, {low} wide", d_inner[:, :inner], x[:, hidden:].contiguous(), True)
    yield Product(f"gradient of B2, {rank} wide", x[:, :hidden], d_inner[:, :rank].contiguous())


def normal(geometry: Geometry, *shape: int) -> Tensor:
    return torch.randn(shape, device=geometry.device, dtype=geometry.torch_dtype)


def buffer(geometry: Geometry, out: int, into: int, room: int) -> Tensor:
    """Weights [E,out,into] with room for LoRA."""
    return normal(geometry, geometry.num_experts, out + room, into + room)
