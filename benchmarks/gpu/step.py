"""A whole training step: time, memory, launches, waits, and the kernels of the most important one."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from findings import Findings
from kernels import kernels
from sizes import Sizes
from torch import Tensor
from torch._dynamo.utils import counters
from waits import waits

from fedflame.bench.measurement import peak_bytes, seconds
from fedflame.bench.step import (
    Launched,
    adapt,
    labelled_batch,
    olmoe_config,
    product_flops,
    random_olmoe,
    step_flops,
    step_optimizer,
    training_step,
)
from fedflame.config.words import Checkpointed
from fedflame.moe.adapted_model import AdaptedModel
from fedflame.moe.expert_adamw import ExpertAdamW

CHECKPOINTING: tuple[Checkpointed, ...] = ("none", "experts")
OTHERWISE: tuple[Launched, ...] = ("compiled", "eager")
FIRST, THEN = (8, 1), (4, 2)
"""The k of the goals, and the others: each compiles anew."""


@dataclass(frozen=True)
class Bench:
    """One model, its optimizer, and what its steps are measured against."""

    sizes: Sizes
    findings: Findings
    adapted: AdaptedModel
    optimizer: ExpertAdamW
    ceiling: float

    def measure(
        self, tokens: int, ks: Sequence[int], checkpointing: Checkpointed, launched: Launched
    ) -> None:
        """Warm the steps of every k up, time them in turn, then count their launches and waits."""
        for lora in self.adapted.loras:
            lora.recompute = checkpointing == "experts"
        settings = {"tokens": tokens, "gradient_checkpointing": checkpointing, "launched": launched}
        steps: dict[int, Callable[[], Tensor]] = {}
        rows: dict[int, dict[str, Any]] = {}
        for k in ks:
            with self.findings.attempt(named(settings, k)):
                step = self._step(tokens, k, launched)
                rows[k] = {**settings, "active_experts": k, **self._warm_up(step)}
                steps[k] = step
        taken: dict[int, list[float]] = {k: [] for k in steps}
        for _ in range(self.sizes.repeats):
            for k, step in steps.items():
                taken[k].append(seconds(step, self.sizes.device))
        for k, step in steps.items():
            self._add({**rows[k], "seconds": statistics.median(taken[k]), "all_seconds": taken[k]}, step)

    def _step(self, tokens: int, k: int, launched: Launched) -> Callable[[], Tensor]:
        vocabulary = self.adapted.model.config.vocab_size
        batch = labelled_batch(vocabulary, tokens // self.sizes.row, self.sizes.row)
        return training_step(self.adapted, self.optimizer, batch, k, launched)

    def _warm_up(self, step: Callable[[], Tensor]) -> dict[str, Any]:
        begun = time.monotonic()
        float(step())
        self.adapted.counts.reset()
        peak = peak_bytes(step, self.sizes.device)
        for _ in range(2):
            float(step())
        warm_up = time.monotonic() - begun
        used = (self.adapted.counts.total > 0).double().mean().item()
        return {"warm_up_seconds": warm_up, "peak_bytes": peak, "experts_used": used}

    def _add(self, row: dict[str, Any], step: Callable[[], Tensor]) -> None:
        """Add a row to the table; the kernels of the first one are a table of their own."""
        sizes, k, rows = self.sizes, row["active_experts"], row["tokens"] // self.sizes.row
        name = named(row, k)
        flops = step_flops(sizes.config, sizes.layers, k, rows, sizes.row)
        row |= {"training_flops": flops, "of_ceiling": flops / row["seconds"] / self.ceiling}
        with self.findings.attempt(f"kernels, {name}"):
            found = kernels(step, sizes.device)
            longest = found.pop("kernels")
            row |= found
            if len(self.findings.tables.get("step", ())) < len(FIRST):
                for kernel in longest:
                    self.findings.add("kernels", active_experts=k, **kernel)
        with self.findings.attempt(f"waits, {name}"):
            row["waits"] = waits(step, sizes.device)
        self.findings.add("step", **row)


def named(settings: Mapping[str, Any], k: int) -> str:
    checkpointing = settings["gradient_checkpointing"]
    return f"{settings['tokens']} tokens, k = {k}, checkpointing {checkpointing}, {settings['launched']}"


def in_order(
    sizes: Sequence[int],
) -> Iterator[tuple[tuple[int, int], int, Checkpointed, Launched]]:
    """Yield k, tokens, checkpointing and launching of all steps, the most important first."""
    for ks in (FIRST, THEN):
        for tokens in sizes:
            for checkpointing in CHECKPOINTING:
                yield ks, tokens, checkpointing, "captured"
        if ks == FIRST:
            for launched in OTHERWISE:
                yield ks, sizes[0], "none", launched


def measure(sizes: Sizes, findings: Findings) -> None:
    begun = time.monotonic()
    adapted = adapt(random_olmoe(olmoe_config(sizes.config, sizes.layers), torch.bfloat16, sizes.device))
    optimizer = step_optimizer(adapted)
    resident = torch.cuda.memory_allocated() if sizes.device == "cuda" else 0
    findings.add("model", build_seconds=time.monotonic() - begun, resident_bytes=resident)
    bench = Bench(sizes, findings, adapted, optimizer, product_flops(sizes.device, sizes.product))
    for ks, tokens, checkpointing, launched in in_order(sizes.tokens):
        with findings.attempt(f"{tokens} tokens, k = {ks}, checkpointing {checkpointing}, {launched}"):
            bench.measure(tokens, ks, checkpointing, launched)
    stats = counters["stats"]
    findings.add("compiler", graphs=stats["unique_graphs"], breaks=sum(counters["graph_break"].values()))
