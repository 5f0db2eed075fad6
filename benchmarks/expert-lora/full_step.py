"""One training step of an OLMoE-1B-7B geometry as a client does it: time, tokens/s and peak, by k.

    python benchmarks/expert-lora/full_step.py [--device cuda] [--tokens 512,2048] [--routing collapsed]

Random weights. Every layer has weights of its own, 0.83 GB, and its own LoRA (r = 16 on experts and on q, k,
v, o). On a GPU all 16 layers run, 14 GB; on a CPU 4, unless --layers says otherwise. One row, of which all
tokens but the first are labelled, the most that the loss can cost. Prints one JSON object.

Routing is balanced, all experts being used, as in a trained model. `collapsed` leaves the weights as they
are initialised: what attention adds to all tokens alike takes over with depth, and they all choose the
same few experts, which is quicker for small k.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch

from fedflame.bench.measurement import one_thread, peak_bytes, seconds
from fedflame.bench.step import (
    adapt,
    labelled_batch,
    olmoe_config,
    product_flops,
    random_olmoe,
    step_flops,
    step_optimizer,
    training_step,
)
from fedflame.config.lists import parse_integers
from fedflame.experiment.environment import environment

CONFIG = Path(__file__).parents[2] / "configs" / "models" / "OLMoE-1B-7B-0924"
LAYERS = {"cpu": 4, "cuda": 16}
CEILING_SIZE = {"cpu": 2048, "cuda": 8192}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--tokens", type=parse_integers, default=[512])
    parser.add_argument("--active-experts", type=parse_integers, default=[8, 4, 2, 1])
    parser.add_argument("--layers", type=int, help="4 on a CPU and all 16 on a GPU, unless given")
    parser.add_argument("--routing", choices=("balanced", "collapsed"), default="balanced")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    with one_thread():
        print(json.dumps(measure(**vars(arguments)), indent=1))


def measure(
    device: str, tokens: list[int], active_experts: list[int], layers: int | None, routing: str, repeats: int
) -> dict[str, Any]:
    machine = environment() | ({"gpu": torch.cuda.get_device_name()} if device == "cuda" else {})
    layers = layers or LAYERS[device]
    config = olmoe_config(CONFIG, layers)
    adapted = adapt(random_olmoe(config, torch.bfloat16, device, balanced=routing == "balanced"))
    optimizer = step_optimizer(adapted)
    steps = {
        (count, k): training_step(adapted, optimizer, labelled_batch(config.vocab_size, 1, count), k)
        for count in tokens
        for k in active_experts
    }
    peaks, used = {}, {}
    for size, step in steps.items():
        step()  # warms up: on a GPU it compiles
        adapted.counts.reset()
        peaks[size] = peak_bytes(step, device)
        used[size] = (adapted.counts.total > 0).double().mean().item()
    taken: dict[tuple[int, int], list[float]] = {size: [] for size in steps}
    for _ in range(repeats):
        for size, step in steps.items():
            taken[size].append(seconds(step, device))
    ceiling = product_flops(device, CEILING_SIZE[device])
    rows = []
    for (count, k), every in taken.items():
        time = statistics.median(every)
        flops = step_flops(CONFIG, layers, k, 1, count)
        rows.append(
            {
                "tokens": count,
                "active_experts": k,
                "seconds": time,
                "all_seconds": every,
                "tokens_per_second": count / time,
                "training_flops": flops,
                "of_matrix_multiply": flops / time / ceiling,
                "peak_bytes": peaks[count, k],
                "experts_used": used[count, k],
            }
        )
    return {
        "environment": machine,
        "matrix_multiply_flops": ceiling,
        "repeats": repeats,
        "layers": layers,
        "routing": routing,
        "steps": rows,
    }


if __name__ == "__main__":
    main()
