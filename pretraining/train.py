"""Train a small OLMoE on openly licensed text and skills statements: the embedded model, or a larger one.

    python pretraining/train.py olmoe-tiny --data DATA_FOLDER --work WORK_FOLDER
    python pretraining/train.py olmoe-small --data DATA_FOLDER --work WORK_FOLDER --device cuda

The finished model is written to the folder that its recipe names. If the program is killed and started again
with the same --work, it goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional
from transformers import OlmoeForCausalLM, PreTrainedTokenizerFast
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from corpus import END, PAD, read_open_text, split_validation, token_stream, train_tokenizer
from recipes import CONTEXT, RECIPES, Recipe
from skills_text import DENSE_WRITERS, dense_documents, documents

SEED = 0
WARMUP_STEPS = 200
DECAY_SHARE = 0.3
CHECKPOINT_EVERY = 500


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", choices=RECIPES)
    parser.add_argument("--data", type=Path, required=True, help="folder with the openly licensed files")
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints and packed tokens")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(arguments.threads)
    recipe = RECIPES[arguments.model]

    training, validation = split_validation(read_open_text(arguments.data), SEED)
    tokenizer = cached_tokenizer(arguments.work / "tokenizer.json", training)
    batches = cached_batches(arguments.work / "tokens.pt", tokenizer, training, recipe)
    held_back = {
        name: packed.to(arguments.device)
        for name, packed in validation_batches(tokenizer, validation).items()
    }
    trained = train(arguments.work / "checkpoint.pt", recipe, batches, held_back, arguments.device)
    save(recipe, *trained, tokenizer, held_back)


def cached_tokenizer(path: Path, texts: list[str]) -> Tokenizer:
    if not path.exists():
        train_tokenizer(texts, SEED).save(str(path))
    return Tokenizer.from_file(str(path))


def cached_batches(path: Path, tokenizer: Tokenizer, texts: list[str], recipe: Recipe) -> Tensor:
    """Return token ids [steps, sequences, context], packed without padding; cache them in `path`."""
    shape = (recipe.steps, recipe.sequences_per_step, CONTEXT)
    if not path.exists():
        stream = token_stream(tokenizer, texts, recipe, SEED)
        packed = np.fromiter(stream, np.int16, count=recipe.steps * recipe.tokens_per_step)
        torch.save(torch.from_numpy(packed).view(shape), path)
    batches: Tensor = torch.load(path)
    if batches.shape != shape:
        raise SystemExit(f"{path}: packed for {tuple(batches.shape)}, asked for {shape}; use another --work")
    return batches


def validation_batches(tokenizer: Tokenizer, texts: list[str]) -> dict[str, Tensor]:
    """Return three sets of 64 sequences: held-back open text, and two of skills text from other seeds."""
    sources = {
        "text": texts,
        "skills": list(itertools.islice(documents(SEED + 2), 400)),
        "dense skills": list(itertools.islice(dense_documents(SEED + 2, DENSE_WRITERS), 400)),
    }
    end = tokenizer.token_to_id(END)
    packed = {}
    for name, source in sources.items():
        ids = [token for text in source for token in [*tokenizer.encode(text).ids, end]]
        packed[name] = torch.tensor(ids[: 64 * CONTEXT]).view(-1, 8, CONTEXT)
    return packed


def learning_rate(recipe: Recipe, step: int) -> float:
    """Return the learning rate: warm-up, constant, linear decay to zero; then a second, lower rise and decay.

    Continuing after a decay is as good as continuing without it: Wen et al.: Understanding
    Warmup-Stable-Decay Learning Rates, arXiv 2410.05192.
    """
    second = recipe.hard_from_step
    if step < second:
        warmup = min(1.0, (step + 1) / WARMUP_STEPS)
        decay = min(1.0, (second - step) / (DECAY_SHARE * second))
        return recipe.peak_learning_rate * min(warmup, decay)
    warmup = min(1.0, (step - second + 1) / WARMUP_STEPS)
    return recipe.second_peak_learning_rate * min(warmup, (recipe.steps - step) / (recipe.steps - second))


def every_expert(experts: Any, hidden: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """Compute all experts for all tokens, with weight zero for those that the router did not choose.

    This is four times the arithmetic of the chosen quarter, but in two large products. For experts of this
    width it is fastest on a GPU, and its time does not depend on the routing.
    """
    count, hidden_size, _ = experts.down_proj.shape
    routing = torch.zeros(len(hidden), count, dtype=weights.dtype, device=hidden.device)
    routing = routing.scatter(1, indices, weights)
    projected = functional.linear(hidden, experts.gate_up_proj.flatten(0, 1)).unflatten(1, (count, -1))
    gate, up = projected.chunk(2, dim=2)
    activated = experts.act_fn(gate) * up * routing.unsqueeze(2).to(gate.dtype)
    return functional.linear(activated.flatten(1), experts.down_proj.transpose(0, 1).reshape(hidden_size, -1))


ALL_EXPERTS_FUNCTIONS.register("every_expert", every_expert)


def new_model(recipe: Recipe, device: str) -> OlmoeForCausalLM:
    torch.manual_seed(SEED)
    model: Any = OlmoeForCausalLM(recipe.config)
    if device == "cuda":
        model.set_experts_implementation("every_expert")
    placed: OlmoeForCausalLM = model.to(device)
    return placed


def train(
    path: Path, recipe: Recipe, batches: Tensor, held_back: dict[str, Tensor], device: str
) -> tuple[OlmoeForCausalLM, dict[str, Any]]:
    """Train the model, or go on from the checkpoint in `path`; return model and measurements."""
    model = new_model(recipe, device)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.05, fused=True)
    state: dict[str, Any] = {"step": 0, "cpu_seconds": 0.0, "wall_seconds": 0.0, "curve": []}
    if path.exists():
        saved = torch.load(path, map_location=device)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        state = saved["state"]
    while state["step"] < len(batches):
        clocks = time.process_time(), time.time()
        last = min(state["step"] + CHECKPOINT_EVERY, len(batches))
        losses = []
        for step in range(state["step"], last):
            optimizer.param_groups[0]["lr"] = learning_rate(recipe, step)
            losses.append(train_step(model, optimizer, batches[step].to(device).long()))
        point = {"tokens": last * recipe.tokens_per_step, "training": float(torch.stack(losses).mean())}
        state["step"] = last
        state["cpu_seconds"] += time.process_time() - clocks[0]
        state["wall_seconds"] += time.time() - clocks[1]
        point |= {name: evaluate(model, packed) for name, packed in held_back.items()}
        state["curve"].append(point)
        write_atomically(
            path, {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "state": state}
        )
        print(f"step {last}/{len(batches)}, {state['wall_seconds']:.0f} s: {point}", flush=True)
    return model, state


def train_step(model: OlmoeForCausalLM, optimizer: torch.optim.Optimizer, ids: Tensor) -> Tensor:
    """Run one step; return its loss without the load-balancing loss, on the device."""
    with torch.autocast(ids.device.type, dtype=torch.bfloat16):
        output = model(input_ids=ids, labels=ids, output_router_logits=True)
    output.loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    loss: Tensor = (output.loss - model.config.router_aux_loss_coef * output.aux_loss).detach()
    return loss


@torch.no_grad()
def evaluate(model: OlmoeForCausalLM, packed: Tensor) -> float:
    with torch.autocast(packed.device.type, dtype=torch.bfloat16):
        return sum(float(model(input_ids=ids, labels=ids).loss) for ids in packed) / len(packed)


@torch.no_grad()
def routing_figures(model: OlmoeForCausalLM, held_back: dict[str, Tensor]) -> dict[str, Any]:
    """Measure the loss with fewer active experts, and each expert's share of the routed slots per layer."""
    routers = [layer.mlp.gate for layer in model.model.layers]
    losses = {}
    for k in (8, 4, 2, 1):
        for router in routers:
            router.top_k = k
        losses[k] = {name: evaluate(model, packed) for name, packed in held_back.items()}
    for router in routers:
        router.top_k = model.config.num_experts_per_tok
    ids = torch.cat([packed[0] for packed in held_back.values()])
    logits = model(input_ids=ids, output_router_logits=True).router_logits
    loads = [
        torch.bincount(layer.topk(8).indices.flatten(), minlength=32) / (ids.numel() * 8) for layer in logits
    ]
    return {"loss_by_active_experts": losses, "expert_load": [load.tolist() for load in loads]}


def save(
    recipe: Recipe,
    model: OlmoeForCausalLM,
    state: dict[str, Any],
    tokenizer: Tokenizer,
    held_back: dict[str, Tensor],
) -> None:
    figures = state | routing_figures(model.bfloat16(), held_back)
    model.save_pretrained(recipe.folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=PAD, model_max_length=CONTEXT
    ).save_pretrained(recipe.folder)
    recipe.results.write_text(json.dumps(figures, indent=1) + "\n")


def write_atomically(path: Path, value: object) -> None:
    partial = path.with_suffix(".partial")
    torch.save(value, partial)
    partial.replace(path)


if __name__ == "__main__":
    main()
