"""A random OLMoE-1B-7B as files that can be mapped, 13.8 GB, written with the memory of one layer."""

from __future__ import annotations

import os
import sys
from collections import defaultdict
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from train import ADAPTER_FILE, WEIGHTS, adapted_model

CONFIG = Path(__file__).parents[2] / "configs" / "models" / "OLMoE-1B-7B-0924"
COMPLETE = "complete"
"""Written last: a folder without it was cut off."""


def write_model(folder: Path) -> None:
    """Config, weights by layer, and the first adapter of a run; nothing to do where they are."""
    if (folder / COMPLETE).exists():
        return
    config = AutoConfig.from_pretrained(CONFIG)
    (folder / WEIGHTS).mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).state_dict()
    layers: dict[str, list[str]] = defaultdict(list)
    for name in empty:
        layers[name.split(".")[2] if ".layers." in name else "rest"].append(name)
    generator = torch.Generator().manual_seed(0)
    for number, (layer, names) in enumerate(layers.items(), 1):
        print(f"writing the model: {number} of {len(layers)}", file=sys.stderr, flush=True)
        values = {
            name: random_weight(name, empty[name], config.num_hidden_layers, generator) for name in names
        }
        save(values, folder / WEIGHTS / f"{layer}.safetensors")
    save(adapted_model(folder).initial_adapter(0).tensors(), folder / ADAPTER_FILE)
    (folder / COMPLETE).touch()


def random_weight(name: str, empty: Tensor, layers: int, generator: torch.Generator) -> Tensor:
    """Normal, so that a token's own embedding stays the most of its state: each token is routed its own way.

    Embeddings of deviation 1, attention outputs scaled down by their number; otherwise the deviation is
    the usual 0.02. With small embeddings all tokens would take the same few experts.
    """
    if empty.dim() == 1:
        return torch.ones(empty.shape, dtype=empty.dtype)
    deviation = 1.0 if "embed_tokens" in name else 0.02
    if "o_proj" in name:
        deviation *= (2 * layers) ** -0.5
    return torch.empty(empty.shape, dtype=empty.dtype).normal_(0, deviation, generator=generator)


def save(values: dict[str, Tensor], path: Path) -> None:
    save_file(values, path, metadata={"format": "pt"})


def drop_from_cache(folder: Path) -> None:
    """Let the kernel forget the files' pages: the group that reads them is to be charged for them."""
    for path in folder.rglob("*.safetensors"):
        file = os.open(path, os.O_RDONLY)
        os.fsync(file)  # what is not on disk yet cannot be forgotten
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)
