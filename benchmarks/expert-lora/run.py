"""What expert LoRA costs beside bare products, the frozen block, split LoRA and PEFT, and a whole step.

    python benchmarks/expert-lora/run.py [--device cuda]

`fedflame bench` for the block, then full_step.py, each in a process of its own. The figures go to
results/ under the device's name, the tables into README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE / "results"
OPTIONS = {
    "cpu": {
        "block": ["--tokens", "512,2048", "--active-experts", "8,1"],
        "step": ["--tokens", "512", "--active-experts", "8,1"],
    },
    "cuda": {
        "block": ["--tokens", "512,2048", "--active-experts", "8,4,2,1"],
        "step": ["--tokens", "512,2048", "--active-experts", "8,4,2,1"],
    },
}
CELLS = ((512, 8), (512, 1), (2048, 8), (2048, 1))


@dataclass(frozen=True)
class Bar:
    """An upper bound on what `ours` takes of a method, for each of `CELLS`; None for no bound."""

    label: str
    method: str
    measure: str
    bounds: tuple[float | None, ...]


BARS = (
    Bar("time, ours / PEFT", "peft", "seconds", (0.27, 0.12, 0.50, 0.17)),
    Bar("time, ours / frozen block", "frozen", "seconds", (1.08, 1.10, 1.05, 1.05)),
    Bar("time, ours / bare products", "gemm", "seconds", (1.22, 1.15, 1.25, 1.15)),
    Bar("saved for backward, ours / PEFT", "peft", "saved_bytes", (1 / 40, 1 / 150, None, None)),
)
STEP_TIME_BAR, STEP_PEAK_BAR = 0.44, 1.5e9


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=OPTIONS, default="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--only", choices=("block", "step", "step-collapsed", "readme"), help="measure no more than this"
    )
    arguments = parser.parse_args()
    commands = {
        "block": ["-m", "fedflame", "bench", "--json"],
        "step": [str(HERE / "full_step.py")],
        "step-collapsed": [str(HERE / "full_step.py"), "--routing", "collapsed"],
    }
    for name, command in commands.items():
        if arguments.only in (None, name):
            options = ["--device", arguments.device, "--repeats", str(arguments.repeats)]
            sizes = OPTIONS[arguments.device][name.partition("-")[0]]
            full = [sys.executable, *command, *options, *sizes]
            quiet = {"OMP_NUM_THREADS": "1", "KINETO_LOG_LEVEL": "99"}
            done = subprocess.run(full, check=True, stdout=subprocess.PIPE, env=os.environ | quiet)
            (RESULTS / f"{arguments.device}-{name}.json").write_bytes(done.stdout)
    (HERE / "README.md").write_text(readme())


def readme() -> str:
    sections = [INTRODUCTION]
    for device in OPTIONS:
        for name, section in SECTIONS.items():
            results = RESULTS / f"{device}-{name}.json"
            if results.exists():
                sections.append(section(device, json.loads(results.read_text())))
    return "\n".join(sections)


def block_section(device: str, result: dict[str, Any]) -> str:
    rows = result["measurements"]
    lines = [f"## One block on {'a CPU' if device == 'cpu' else 'a GPU'}\n"]
    if device == "cpu":
        lines += [bars_table(rows), ""]
    lines.append(head("tokens", "k", "method", "seconds", "of ours", "saved, MB", "peak, MB"))
    for row in rows:
        ours = find(rows, row["tokens"], row["active_experts"], "ours")
        cells = [row["tokens"], row["active_experts"], row["method"], f"{row['seconds']:.4g}"]
        cells.append(f"{row['seconds'] / ours['seconds']:.2f}")
        cells += [f"{row[name] / 1e6:.1f}" for name in ("saved_bytes", "peak_bytes")]
        lines.append(line(*cells))
    return "\n".join([*lines, "", origin(result), ""])


def bars_table(rows: list[dict[str, Any]]) -> str:
    """Ratio, bound and whether it is met."""
    lines = [head("ours against", *(f"{tokens} tokens, k = {k}" for tokens, k in CELLS))]
    for bar in BARS:
        cells = []
        for (tokens, k), bound in zip(CELLS, bar.bounds, strict=True):
            ours, other = (find(rows, tokens, k, name)[bar.measure] for name in ("ours", bar.method))
            cells.append(verdict(ours / other, bound))
        lines.append(line(bar.label, *cells))
    return "\n".join(lines)


def step_section(device: str, result: dict[str, Any]) -> str:
    rows = result["steps"]
    place = "a CPU" if device == "cpu" else "a GPU"
    lines = [f"## A whole training step on {place}, routing {result['routing']}\n"]
    if "layers" in result:
        lines += [f"{result['layers']} layers, each with weights of its own.\n"]
    if device == "cpu":
        (time,) = (verdict(ratio, STEP_TIME_BAR) for ratio in time_ratios(rows).values())
        (full,) = (row for row in rows if row["active_experts"] == 8)
        peak = verdict(full["peak_bytes"] / 1e9, STEP_PEAK_BAR / 1e9)
        lines += [f"Time at k = 1 over that at k = 8: {time}. Peak above model, adapter and optimizer at"]
        lines += [f"k = 8, in GB: {peak}.\n"]
    else:
        ratios = ", ".join(f"{ratio:.3g} with {tokens} tokens" for tokens, ratio in time_ratios(rows).items())
        lines += [f"Time at k = 1 over that at k = 8: {ratios}.\n"]
    names = ("tokens", "k", "seconds", "tokens/s", "TFLOP", "of bare product", "peak, MB", "experts used")
    lines.append(head(*names))
    for row in rows:
        cells = [row["tokens"], row["active_experts"], f"{row['seconds']:.4g}"]
        cells += [f"{row['tokens_per_second']:,.1f}", f"{row['training_flops'] / 1e12:.2f}"]
        cells += [f"{row['of_matrix_multiply']:.0%}", f"{row['peak_bytes'] / 1e6:,.0f}"]
        cells.append(f"{row['experts_used']:.0%}")
        lines.append(line(*cells))
    product = f"One large bfloat16 product: {result['matrix_multiply_flops'] / 1e12:.3g} TFLOP/s."
    return "\n".join([*lines, "", product, origin(result), ""])


def time_ratios(rows: list[dict[str, Any]]) -> dict[int, float]:
    """Seconds at k = 1 over those at k = 8, by tokens."""
    seconds = {(row["tokens"], row["active_experts"]): row["seconds"] for row in rows}
    return {tokens: seconds[tokens, 1] / seconds[tokens, 8] for tokens, k in seconds if k == 8}


SECTIONS = {"block": block_section, "step": step_section, "step-collapsed": step_section}


def find(rows: list[dict[str, Any]], tokens: int, k: int, method: str) -> dict[str, Any]:
    wanted = (tokens, k, method)
    (found,) = [row for row in rows if (row["tokens"], row["active_experts"], row["method"]) == wanted]
    return found


def verdict(value: float, bound: float | None) -> str:
    if bound is None:
        return f"{value:.3g}"
    return f"{value:.3g} (<= {bound:.3g}) {'met' if value <= bound else '**missed**'}"


def head(*cells: str) -> str:
    return line(*cells) + "\n" + "| --- " * len(cells) + "|"


def line(*cells: object) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def origin(result: dict[str, Any]) -> str:
    machine = result["environment"]
    processor = machine.get("gpu", f"{machine['processor']}, one of {machine['cpus']} cores")
    versions = ", ".join(f"{name} {machine[name]}" for name in ("python", "torch", "transformers", "peft"))
    return f"{processor}; {versions}; {result['repeats']} repeats; {machine['date'][:10]}."


INTRODUCTION = """# What expert LoRA costs

One MoE block of OLMoE-1B-7B (64 experts, H = 2048, I = 1024, r = 16, bfloat16, random weights, near-uniform
load), forward and backward with gradients to the input, through the routing weights and to the adapter:

- **ours**: the experts function that `fedflame` registers; fp32 banks A1, B1, A2, B2;
- **ours-checkpointed**: the same with `training.gradient_checkpointing = "experts"`: the pre-activation is
  computed again in the backward instead of kept;
- **frozen**: transformers' own `grouped_mm` experts without LoRA, gradient to the input only;
- **gemm**: only the four products of the frozen base on rows sorted beforehand, the floor;
- **composed**: split LoRA with grouped_mm and plain autograd, on the same fp32 banks;
- **peft**: `LoraConfig(target_parameters=[gate_up_proj, down_proj], r=16)`, fp32 adapters. Gate and up
  share one A there, so that it has fewer parameters than ours (7.3 M against 9.4 M).

Before anything is timed, output and all gradients of ours must equal those of composed.
Methods take turns in one process on one thread; seconds are CPU time of that thread, medians. *Saved* is
what autograd keeps from forward to backward: distinct storages without parameters and input. *Peak* is the
most that torch's allocator handed out during the pass beside weights and input, gradients included; scratch
memory inside the matrix library and what the C library keeps of freed blocks are not in it, so the resident
size of a process grows by more. On a GPU time is from events, and the peak is torch.cuda's. Compare ratios,
not seconds: they do not travel.

The whole step (`full_step.py`) is OLMoE-1B-7B with its head, a loss at every token but the first, LoRA on
experts and on q, k, v, o, and AdamW. On a GPU all 16 layers run, on a CPU 4 (`--layers` says otherwise), each
with weights of its own. The step figures below are older than this: their 16 layers shared the weights of
one, and each had its own LoRA. Now the experts' weights of a layer lie in one buffer with its LoRA, so that
no two layers can share them. The routing is balanced, as that of a trained model, unless the heading says
*collapsed*: so the weights are initialised, and by depth all tokens choose the same few experts, whose
products are then larger and quicker at small k.

On the H200 one row does not fill the GPU: a block takes three to six times as long as its products, a whole
step reaches a tenth of what one large product does, and a smaller k saves memory but next to no time. What
the tables say of time there is what it takes to start the kernels, and it says nothing of larger batches.

    python benchmarks/expert-lora/run.py                  # writes results/cpu-*.json and this file
    python benchmarks/expert-lora/run.py --device cuda    # the same on a GPU, k = 8, 4, 2, 1
"""


if __name__ == "__main__":
    main()
