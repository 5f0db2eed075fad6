"""Parts of a step alone: optimizer, head, routing, and the banks' way into the products."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from eager import eager
from findings import Findings
from sizes import ACTIVE, Sizes
from torch import Tensor
from torch.autograd.graph import increment_version

from fedflame.bench.block import Geometry, frozen_model, random_rows
from fedflame.bench.measurement import median_seconds
from fedflame.bench.methods import METHODS
from fedflame.bench.step import LEARNING_RATE, WEIGHT_DECAY, olmoe_config
from fedflame.moe.expert_lora import ExpertLoRA
from fedflame.moe.masked_adamw import Moments, masked_adamw
from fedflame.moe.routed_rows import RoutedRows
from fedflame.training.token_loss import CHUNK_BYTES, token_loss


def measure(sizes: Sizes, findings: Findings) -> None:
    def add(part: str, run: Callable[[], object]) -> None:
        with findings.attempt(part):
            findings.add("parts", part=part, seconds=median_seconds(run, sizes.device, sizes.repeats))

    geometry = sizes.geometry
    lora: ExpertLoRA = (
        METHODS["ours"].build(frozen_model(geometry), geometry).model.layers[0].mlp.experts.fedflame
    )
    optimizer = bank_steps(lora)
    add("masked AdamW on the banks of one layer", optimizer)
    with eager():
        add("masked AdamW on the banks of one layer, uncompiled", optimizer)
    add("torch's AdamW on as many values, without a mask", torch_steps(lora))
    add("banks of one layer into their products", partial(rewrite, lora))
    tokens, vocabulary = sizes.tokens[0], olmoe_config(sizes.config, 1).vocab_size
    chosen_chunk = CHUNK_BYTES[sizes.device] // (4 * vocabulary)
    for chunk in (*sizes.chunks, chosen_chunk):
        name = f"head and loss of {tokens} tokens, {chunk} at a time"
        add(name + " (as in a step)" * (chunk == chosen_chunk), head(geometry, tokens, vocabulary, chunk))
    for count in sizes.tokens:
        for k in (ACTIVE[0], ACTIVE[-1]):
            choices = torch.rand(count, geometry.num_experts, device=sizes.device).topk(k).indices
            name = f"sorting the choices of {count} tokens, k = {k}"
            add(name, partial(RoutedRows.sort, choices, geometry.num_experts))


def bank_steps(lora: ExpertLoRA) -> Callable[[], None]:
    """One step of the banks of a layer, all experts touched."""
    banks = [bank.detach() for bank in lora.banks().values()]
    states = [(bank, Moments.of(bank), torch.randn_like(bank)) for bank in banks]
    touched = torch.ones(len(banks[0]), dtype=torch.bool, device=banks[0].device)

    def run() -> None:
        for bank, moments, gradient in states:
            masked_adamw(bank, moments, gradient, touched, LEARNING_RATE, WEIGHT_DECAY)

    return run


def torch_steps(lora: ExpertLoRA) -> Callable[[], object]:
    copies = [torch.nn.Parameter(bank.detach().clone()) for bank in lora.banks().values()]
    for copy in copies:
        copy.grad = torch.randn_like(copy)
    return torch.optim.AdamW(copies, LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True).step


def rewrite(lora: ExpertLoRA) -> None:
    increment_version(lora.banks().values())
    lora.written()


def head(geometry: Geometry, tokens: int, vocabulary: int, chunk: int) -> Callable[[], None]:
    """Forward and backward of the loss from the last hidden states."""
    hidden = random_rows(geometry, tokens, geometry.hidden_size, seed=0).requires_grad_()
    weight = torch.randn(vocabulary, geometry.hidden_size, device=geometry.device, dtype=geometry.torch_dtype)
    labels = torch.arange(tokens, device=geometry.device) % vocabulary

    def logits(states: Tensor) -> Tensor:
        return states @ weight.T

    def run() -> None:
        hidden.grad = None
        token_loss(hidden, labels, logits, chunk).mean().backward()

    return run
