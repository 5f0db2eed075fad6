"""One client's round on the model of a folder, as JSON: seconds and touched experts by step, loss, digest.

    python benchmarks/larger-than-memory/train.py FOLDER K STEPS [checkpointing]

run.py starts it, in a group of limited memory, and writes the folder.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig

from fedflame.base.mapped import load_mapped
from fedflame.config.sections import AdapterConfig
from fedflame.config.words import Checkpointed
from fedflame.data.encoding import EncodedRow
from fedflame.messages import Adapter, RoundPlan
from fedflame.moe.adapted_model import AdaptedModel
from fedflame.moe.read_ahead import read_ahead
from fedflame.training.fine_tune import fine_tune

ADAPTER = AdapterConfig(r=16, target_modules=("q_proj", "k_proj", "v_proj", "o_proj"))
TOKENS = 512
WEIGHTS, ADAPTER_FILE = "weights", "adapter.safetensors"


def main() -> None:
    folder, k, steps = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    print(json.dumps(train(folder, k, steps, "layers" if "checkpointing" in sys.argv else "none")))


def train(folder: Path, k: int, steps: int, gradient_checkpointing: Checkpointed) -> dict[str, Any]:
    adapted = adapted_model(folder, gradient_checkpointing)
    read_ahead(adapted.layers)
    begun, worked = [time.monotonic()], [time.process_time()]
    touched = [torch.zeros_like(adapted.counts.total)]

    def on_step(tokens: int) -> None:
        begun.append(time.monotonic())
        worked.append(time.process_time())
        touched.append(adapted.counts.total.clone())
        print(f"k = {k}, step {len(begun) - 1}: {begun[-1] - begun[-2]:.1f} s", file=sys.stderr, flush=True)

    update = fine_tune(adapted, rows(steps), plan(adapted, folder, k, steps), 1, on_step)
    used = torch.stack(touched).diff(dim=0) > 0
    return {
        "seconds": [after - before for before, after in itertools.pairwise(begun)],
        "cpu_seconds": [after - before for before, after in itertools.pairwise(worked)],
        "touched": used.flatten(1).float().mean(1).tolist(),
        "loss": update.loss,
        "digest": digest(update.delta.tensors()),
    }


def adapted_model(folder: Path, gradient_checkpointing: Checkpointed = "none") -> AdaptedModel:
    config = AutoConfig.from_pretrained(folder)
    model, _ = load_mapped(folder / WEIGHTS, config, torch.bfloat16)
    targets = ADAPTER.target_modules
    return AdaptedModel(
        model.eval(), ADAPTER.r, ADAPTER.lora_alpha, targets, gradient_checkpointing, mapped=True
    )


def plan(adapted: AdaptedModel, folder: Path, k: int, steps: int) -> RoundPlan:
    """As a server would send it, but that the adapter is mapped from its file."""
    return RoundPlan(
        round=0,
        client=0,
        seed=0,
        active_experts=k,
        rescaler="learned",
        rescaler_values=torch.ones(len(adapted.layers)),
        adapter=Adapter.from_tensors(load_file(folder / ADAPTER_FILE)),
        learning_rate=1e-4,
        weight_decay=0.01,
        batch_size=1,
        max_steps=steps,
    )


def rows(count: int) -> list[EncodedRow]:
    """Random tokens, one row per step."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, 50304, (count, TOKENS), generator=generator)
    return [EncodedRow(row, 1, False) for row in ids.tolist()]


def digest(tensors: dict[str, Tensor]) -> str:
    """Of all bits of the values."""
    blake = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        blake.update(tensors[name].contiguous().numpy())
    return blake.hexdigest()


if __name__ == "__main__":
    main()
