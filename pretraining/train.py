"""Train the embedded model: a small OLMoE on openly licensed text and skills statements.

    python pretraining/train.py --data DATA_FOLDER --work WORK_FOLDER --out src/fedflame/assets/olmoe-tiny

Killed and started again with the same --work, it goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import OlmoeConfig, OlmoeForCausalLM, PreTrainedTokenizerFast

from corpus import (
    DENSE_FROM_STEP,
    END,
    HARD_FROM_STEP,
    PAD,
    VOCABULARY_SIZE,
    dense_token_stream,
    hard_token_stream,
    read_open_text,
    split_validation,
    token_stream,
    train_tokenizer,
)
from skills_text import DENSE_WRITERS, dense_documents, documents

SEED = 0
CONTEXT = 256
SEQUENCES_PER_STEP = 8
STEPS = 15_800
PEAK_LEARNING_RATE = 2e-3
SECOND_PEAK_LEARNING_RATE = 1e-3
WARMUP_STEPS = 200
DECAY_SHARE = 0.3
CHECKPOINT_EVERY = 500
CONFIG = OlmoeConfig(
    vocab_size=VOCABULARY_SIZE,
    hidden_size=128,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=4,
    num_experts=32,
    num_experts_per_tok=8,
    norm_topk_prob=False,
    router_aux_loss_coef=0.02,
    tie_word_embeddings=True,
    max_position_embeddings=CONTEXT,
    pad_token_id=0,
    bos_token_id=None,
    eos_token_id=1,
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with the openly licensed files")
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints and packed tokens")
    parser.add_argument("--out", type=Path, required=True, help="folder for the finished model")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(arguments.threads)

    training, validation = split_validation(read_open_text(arguments.data), SEED)
    tokenizer = cached_tokenizer(arguments.work / "tokenizer.json", training)
    batches = cached_batches(arguments.work / "tokens.pt", tokenizer, training)
    held_back = validation_batches(tokenizer, validation)
    state = train(arguments.work / "checkpoint.pt", batches, held_back)
    save(arguments.out, state, tokenizer, held_back)


def cached_tokenizer(path: Path, texts: list[str]) -> Tokenizer:
    if not path.exists():
        train_tokenizer(texts, SEED).save(str(path))
    return Tokenizer.from_file(str(path))


def cached_batches(path: Path, tokenizer: Tokenizer, texts: list[str]) -> torch.Tensor:
    """Token ids [steps, sequences, context], packed from the three streams without padding."""
    shape = (STEPS, SEQUENCES_PER_STEP, CONTEXT)
    if not path.exists():
        per_step = SEQUENCES_PER_STEP * CONTEXT
        first = token_stream(tokenizer, texts, SEED)
        dense = dense_token_stream(tokenizer, texts, SEED)
        hard = hard_token_stream(tokenizer, texts, SEED)
        ids = [
            *itertools.islice(first, DENSE_FROM_STEP * per_step),
            *itertools.islice(dense, (HARD_FROM_STEP - DENSE_FROM_STEP) * per_step),
            *itertools.islice(hard, (STEPS - HARD_FROM_STEP) * per_step),
        ]
        torch.save(torch.tensor(ids, dtype=torch.int16).view(shape), path)
    batches: torch.Tensor = torch.load(path)
    if batches.shape != shape:
        raise SystemExit(f"{path}: packed for {tuple(batches.shape)}, asked for {shape}; use another --work")
    return batches


def validation_batches(tokenizer: Tokenizer, texts: list[str]) -> dict[str, torch.Tensor]:
    """Three sets of 64 sequences: open text that was held back, and skills text of other seeds."""
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


def learning_rate(step: int) -> float:
    """Warm-up, constant, linear fall to zero over `DECAY_SHARE`; then a second, lower rise and fall.

    Going on from the end of a fall is as good as never having fallen: Wen et al.: Understanding
    Warmup-Stable-Decay Learning Rates, arXiv 2410.05192.
    """
    if step < HARD_FROM_STEP:
        warmup = min(1.0, (step + 1) / WARMUP_STEPS)
        decay = min(1.0, (HARD_FROM_STEP - step) / (DECAY_SHARE * HARD_FROM_STEP))
        return PEAK_LEARNING_RATE * min(warmup, decay)
    warmup = min(1.0, (step - HARD_FROM_STEP + 1) / WARMUP_STEPS)
    return SECOND_PEAK_LEARNING_RATE * min(warmup, (STEPS - step) / (STEPS - HARD_FROM_STEP))


def train(path: Path, batches: torch.Tensor, held_back: dict[str, torch.Tensor]) -> dict[str, Any]:
    torch.manual_seed(SEED)
    model = OlmoeForCausalLM(CONFIG)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.05, fused=True)
    state: dict[str, Any] = {"step": 0, "cpu_seconds": 0.0, "wall_seconds": 0.0, "curve": []}
    if path.exists():
        saved = torch.load(path)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        state = saved["state"]
    while state["step"] < len(batches):
        clocks = time.process_time(), time.time()
        last = min(state["step"] + CHECKPOINT_EVERY, len(batches))
        losses = [train_step(model, optimizer, batches, step) for step in range(state["step"], last)]
        state["step"] = last
        state["cpu_seconds"] += time.process_time() - clocks[0]
        state["wall_seconds"] += time.time() - clocks[1]
        point = {"tokens": last * batches[0].numel(), "training": sum(losses) / len(losses)}
        point |= {name: evaluate(model, packed) for name, packed in held_back.items()}
        state["curve"].append(point)
        write_atomically(
            path, {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "state": state}
        )
        print(f"step {last}/{len(batches)}, {state['cpu_seconds']:.0f} CPU-s: {point}", flush=True)
    return {"model": model.state_dict(), "state": state}


def train_step(
    model: OlmoeForCausalLM, optimizer: torch.optim.Optimizer, batches: torch.Tensor, step: int
) -> float:
    optimizer.param_groups[0]["lr"] = learning_rate(step)
    ids = batches[step].long()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(input_ids=ids, labels=ids, output_router_logits=True)
    output.loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return float(output.loss.detach() - CONFIG.router_aux_loss_coef * output.aux_loss.detach())


@torch.no_grad()
def evaluate(model: OlmoeForCausalLM, packed: torch.Tensor) -> float:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return sum(float(model(input_ids=ids, labels=ids).loss) for ids in packed) / len(packed)


@torch.no_grad()
def routing_figures(model: OlmoeForCausalLM, held_back: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Loss with fewer active experts, and each expert's share of the routed slots, per layer."""
    routers = [layer.mlp.gate for layer in model.model.layers]
    losses = {}
    for k in (8, 4, 2, 1):
        for router in routers:
            router.top_k = k
        losses[k] = {name: evaluate(model, packed) for name, packed in held_back.items()}
    for router in routers:
        router.top_k = CONFIG.num_experts_per_tok
    ids = torch.cat([packed[0] for packed in held_back.values()])
    logits = model(input_ids=ids, output_router_logits=True).router_logits
    loads = [
        torch.bincount(layer.topk(8).indices.flatten(), minlength=32) / (ids.numel() * 8) for layer in logits
    ]
    return {"loss_by_active_experts": losses, "expert_load": [load.tolist() for load in loads]}


def save(out: Path, state: dict[str, Any], tokenizer: Tokenizer, held_back: dict[str, torch.Tensor]) -> None:
    model = OlmoeForCausalLM(CONFIG)
    model.load_state_dict(state["model"])
    figures = state["state"] | routing_figures(model.bfloat16(), held_back)
    model.save_pretrained(out)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=PAD, model_max_length=CONTEXT
    ).save_pretrained(out)
    (Path(__file__).parent / "results.json").write_text(json.dumps(figures, indent=1) + "\n")


def write_atomically(path: Path, value: object) -> None:
    partial = path.with_suffix(".partial")
    torch.save(value, partial)
    partial.replace(path)


if __name__ == "__main__":
    main()
