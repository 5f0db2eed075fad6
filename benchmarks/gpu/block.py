"""One MoE block, forward and backward: ours beside split LoRA, PEFT and the frozen block.

Each is launched kernel by kernel, as a program that knows nothing of the others would, and as a CUDA graph,
as `training.captured` launches whole steps.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field

import torch
from eager import eager
from findings import Findings
from sizes import ACTIVE, Sizes
from torch import Tensor

from fedflame.bench.block import frozen_model
from fedflame.bench.measurement import measure as measure_passes
from fedflame.bench.measurement import require_equal
from fedflame.bench.methods import METHODS, Pass
from fedflame.bench.step import product_flops

OURS, OURS_EAGER, CAPTURED = "ours", "ours-eager", "-captured"
COMPARED = (OURS, "composed", "peft", "frozen")


@dataclass(frozen=True)
class EagerPass(Pass):
    """The same pass with nothing compiled."""

    def run(self) -> Tensor:
        with eager():
            return super().run()


@dataclass(frozen=True)
class CapturedPass(Pass):
    """The same pass as a CUDA graph, from its second run on; a CPU has none."""

    graph: list[tuple[torch.cuda.CUDAGraph, Tensor]] = field(default_factory=list)
    ran: list[bool] = field(default_factory=list)

    def run(self) -> Tensor:
        if self.d_output.device.type == "cpu" or not self.ran:
            self.ran.append(True)
            return super().run()
        if not self.graph:
            with torch.cuda.graph(graph := torch.cuda.CUDAGraph()):
                output = super().run()
            self.graph.append((graph, output))
        graph, output = self.graph[0]
        graph.replay()
        return output


def measure(sizes: Sizes, findings: Findings) -> None:
    geometry = sizes.geometry
    frozen = frozen_model(geometry)
    models = {name: METHODS[name].build(frozen, geometry) for name in COMPARED}
    ceiling = product_flops(sizes.device, sizes.product)
    for tokens in sizes.tokens:
        for k in ACTIVE:
            size = {"tokens": tokens, "active_experts": k}
            passes = {
                name: METHODS[name].prepare(model, geometry, tokens, k) for name, model in models.items()
            }
            begun = time.monotonic()
            with findings.attempt(f"ours against composed, {tokens} tokens, k = {k}"):
                require_equal(passes[OURS], passes["composed"])
            warm_up = time.monotonic() - begun
            captured = {name + CAPTURED: CapturedPass(**vars(one)) for name, one in passes.items()}
            passes |= {OURS_EAGER: EagerPass(**vars(passes[OURS])), **captured}
            flops = 12 * tokens * k * geometry.hidden_size * geometry.intermediate_size
            with findings.attempt(f"block, {tokens} tokens, k = {k}"):
                measured = measure_passes(passes, sizes.device, sizes.repeats, lambda name: None)
                for name, value in measured.items():
                    share = flops / value.seconds / ceiling
                    findings.add("block", **size, method=name, **asdict(value), of_ceiling=share)
                findings.add("warm_up", **size, seconds=warm_up)
