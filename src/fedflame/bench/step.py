"""A whole training step of an OLMoE with random weights, as a client takes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, OlmoeConfig, OlmoeForCausalLM

from fedflame.bench.measurement import median_seconds
from fedflame.config.sections import AdapterConfig
from fedflame.config.words import Checkpointed
from fedflame.cost.flops import training_flops_per_token
from fedflame.cost.model_shape import read_model_shape
from fedflame.data.batches import IGNORE_INDEX, Batch
from fedflame.moe.adapted_model import AdaptedModel
from fedflame.moe.expert_adamw import ExpertAdamW
from fedflame.training.steps import training_steps

ADAPTER = AdapterConfig(r=16, target_modules=("q_proj", "k_proj", "v_proj", "o_proj"))
SEED = 0
LEARNING_RATE, WEIGHT_DECAY = 1e-4, 0.01
Launched = Literal["eager", "compiled", "captured"]
"""How a GPU gets its work: layers kernel by kernel, compiled layers, or these within a graph of the step."""


def olmoe_config(folder: Path, layers: int) -> OlmoeConfig:
    """Read the config of an OLMoE from a folder, with so many layers."""
    config: OlmoeConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    config.num_hidden_layers = layers
    return config


def random_olmoe(
    config: OlmoeConfig, dtype: torch.dtype, device: str, balanced: bool = True
) -> OlmoeForCausalLM:
    """Build an OLMoE on this device, with weights as it is initialised with.

    With `balanced`, its routing uses all experts, as that of a trained model does. Otherwise, what attention
    adds to all tokens alike takes over with depth, and they all choose the same few experts.
    """
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(SEED)
        model: OlmoeForCausalLM = AutoModelForCausalLM.from_config(
            config, dtype=dtype, trust_remote_code=False
        )
        if balanced:
            _balance(model)
    return model


def _balance(model: OlmoeForCausalLM) -> None:
    """Let every layer see the tokens' own embeddings more than what the layers before it added."""
    model.model.embed_tokens.weight.data.normal_()
    for layer in model.model.layers:
        for output in (layer.self_attn.o_proj.weight, layer.mlp.experts.down_proj):
            output.data.mul_(0.1)


def adapt(model: OlmoeForCausalLM, gradient_checkpointing: Checkpointed = "none") -> AdaptedModel:
    """Attach an adapter as at the start of a run: `ADAPTER` on the experts and on q, k, v and o."""
    targets = ADAPTER.target_modules
    adapted = AdaptedModel(model, ADAPTER.r, ADAPTER.lora_alpha, targets, gradient_checkpointing)
    adapted.load(adapted.initial_adapter(SEED), torch.ones(len(adapted.layers)))
    return adapted


def labelled_batch(vocabulary: int, rows: int, length: int) -> Batch:
    """Return rows of random tokens, all labelled but the first of each: the most that the loss can cost."""
    generator = torch.Generator().manual_seed(rows * length)
    ids = torch.randint(vocabulary, (rows, length), generator=generator)
    labels = ids.clone()
    labels[:, 0] = IGNORE_INDEX
    return Batch(ids, torch.ones_like(ids), labels)


def step_optimizer(adapted: AdaptedModel, learning_rate: float = LEARNING_RATE) -> ExpertAdamW:
    """Return the optimizer of a client that learns its rescalers."""
    scalars = [lora.s for lora in adapted.loras]
    attention = adapted.attention.values()
    return ExpertAdamW(adapted.loras, attention, learning_rate, WEIGHT_DECAY, unregularized=scalars)


def training_step(
    adapted: AdaptedModel, optimizer: ExpertAdamW, batch: Batch, k: int, launched: Launched = "captured"
) -> Callable[[], Tensor]:
    """Return a function that takes one optimizer step with k experts per token, and returns the mean loss.

    It is a step of `training.fine_tune`. By default it runs as that function would run it here; see
    `Launched`.
    """
    running = adapted.active_experts if launched == "eager" else adapted.training
    step = training_steps(adapted, optimizer, capture=launched == "captured")

    def within() -> Tensor:
        with running(k):
            return step(batch)

    return within


def step_flops(folder: Path, layers: int, k: int, rows: int, length: int) -> float:
    """Return the FLOPs of a `training_step` on a `labelled_batch`, for the config in this folder."""
    shape = read_model_shape(folder)
    sparse, attention = shape.sparse_layers[:layers], shape.attention[:layers]
    shape = replace(shape, sparse_layers=sparse, attention=attention)
    labelled = (length - 1) / length
    per_token = training_flops_per_token(shape, k, ADAPTER.r, ADAPTER.target_modules, length, labelled)
    return rows * length * per_token.total


def product_flops(device: str, size: int) -> float:
    """Measure the FLOP per second of one bfloat16 product of this size: no step on the device can pass it."""
    left, right = torch.randn(2, size, size, dtype=torch.bfloat16, device=device)
    return 2 * size**3 / median_seconds(lambda: left @ right, device, 10)
