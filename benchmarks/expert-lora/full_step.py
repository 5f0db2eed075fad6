"""One training step of an OLMoE-1B-7B geometry as a client does it: time, tokens/s and peak, by k.

    python benchmarks/expert-lora/full_step.py [--device cuda] [--tokens 512,2048] [--routing collapsed]

Random weights; all 16 layers share those of the first, so that the frozen base takes 1.5 GB and not
14, with the same arithmetic. Every layer has its own LoRA (r = 16 on experts and on q, k, v, o).
All tokens but the first are labelled, the most that the loss can cost. Prints one JSON object.

Routing is balanced, all experts being used, as in a trained model. `collapsed` leaves the weights as they
are initialised: what attention adds to all tokens alike takes over with depth, and they all choose the
same few experts, which is quicker for small k.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, OlmoeForCausalLM

from fedflame.bench.block import sharing_copy
from fedflame.bench.measurement import one_thread, peak_bytes, seconds
from fedflame.config.lists import parse_integers
from fedflame.config.sections import AdapterConfig
from fedflame.cost.flops import training_flops_per_token
from fedflame.cost.model_shape import read_model_shape
from fedflame.data.batches import IGNORE_INDEX, Batch
from fedflame.experiment.environment import environment
from fedflame.moe.adapted_model import AdaptedModel
from fedflame.moe.expert_adamw import ExpertAdamW
from fedflame.training.token_loss import token_losses

CONFIG = Path(__file__).parents[2] / "configs" / "models" / "OLMoE-1B-7B-0924"
ADAPTER = AdapterConfig(r=16)
TARGETS = ADAPTER.target_modules
CEILING_SIZE = {"cpu": 2048, "cuda": 8192}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--tokens", type=parse_integers, default=[512])
    parser.add_argument("--active-experts", type=parse_integers, default=[8, 4, 2, 1])
    parser.add_argument("--routing", choices=("balanced", "collapsed"), default="balanced")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    with one_thread():
        print(json.dumps(measure(**vars(arguments)), indent=1))


def measure(
    device: str, tokens: list[int], active_experts: list[int], routing: str, repeats: int
) -> dict[str, Any]:
    machine = environment() | ({"gpu": torch.cuda.get_device_name()} if device == "cuda" else {})
    adapted = adapted_model(device, balanced=routing == "balanced")
    loras = adapted.loras
    optimizer = ExpertAdamW(loras, adapted.attention.values(), 1e-4, 0.01, [lora.s for lora in loras])
    steps = {
        (count, k): training_step(adapted, optimizer, batch(count, device), k)
        for count in tokens
        for k in active_experts
    }
    peaks, used = {}, {}
    for size, step in steps.items():
        adapted.counts.reset()
        peaks[size] = peak_bytes(step, device)  # warms it up too
        used[size] = (adapted.counts.total > 0).double().mean().item()
    taken: dict[tuple[int, int], list[float]] = {size: [] for size in steps}
    for _ in range(repeats):
        for size, step in steps.items():
            taken[size].append(seconds(step, device))
    ceiling, shape = matrix_multiply_flops(device), read_model_shape(CONFIG)
    rows = []
    for (count, k), every in taken.items():
        time = statistics.median(every)
        flops = count * training_flops_per_token(shape, k, ADAPTER.r, TARGETS, count).total
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
        "routing": routing,
        "steps": rows,
    }


def adapted_model(device: str, balanced: bool) -> AdaptedModel:
    """OLMoE-1B-7B in bfloat16, layer 1 to 15 around the weights of layer 0, with a random adapter."""
    config = AutoConfig.from_pretrained(CONFIG)
    layers = config.num_hidden_layers
    config.num_hidden_layers = 1
    torch.manual_seed(0)
    model: OlmoeForCausalLM = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.config.num_hidden_layers = layers
    first = model.model.layers[0]
    if balanced:
        balance(model, first)
    # The config too: from it every layer reads which experts function is to run.
    model.model.layers.extend([sharing_copy(first, model.config) for _ in range(layers - 1)])
    adapted = AdaptedModel(model.to(device), ADAPTER.r, ADAPTER.lora_alpha, TARGETS)
    adapted.load(adapted.initial_adapter(0), torch.ones(layers))
    model.to(device)  # the adapter
    return adapted


def balance(model: OlmoeForCausalLM, layer: Any) -> None:
    """Let every layer see the tokens' own embeddings more than what layers before it added."""
    model.model.embed_tokens.weight.data.normal_()
    for output in (layer.self_attn.o_proj.weight, layer.mlp.experts.down_proj):
        output.data.mul_(0.1)


def batch(tokens: int, device: str) -> Batch:
    """One row of random tokens, all labelled but the first."""
    config = AutoConfig.from_pretrained(CONFIG)
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.randint(config.vocab_size, (1, tokens), generator=generator).to(device)
    labels = ids.clone()
    labels[:, 0] = IGNORE_INDEX
    return Batch(ids, torch.ones_like(ids), labels)


def training_step(adapted: AdaptedModel, optimizer: ExpertAdamW, one: Batch, k: int) -> Callable[[], None]:
    def step() -> None:
        with adapted.active_experts(k):
            adapted.counts.begin_step(one.attention_mask)
            loss = token_losses(adapted, one).mean()
            optimizer.backward(loss, adapted.counts.touched())
            adapted.counts.end_step()

    return step


def matrix_multiply_flops(device: str) -> float:
    """FLOP per second of one large bfloat16 product: what no training step on this device can pass."""
    size = CEILING_SIZE[device]
    left, right = torch.randn(2, size, size, dtype=torch.bfloat16, device=device)
    for _ in range(3):
        left @ right
    times = [seconds(lambda: left @ right, device) for _ in range(10)]
    return 2 * size**3 / statistics.median(times)


if __name__ == "__main__":
    main()
