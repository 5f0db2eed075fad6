"""FLAME from scratch: federated fine-tuning of a sparse mixture of experts, in plain loops.

The method of Le, Tran, Hua, Chawla (arXiv 2506.16600) without the library, each equation in one place.
tests/test_flame_from_scratch.py compares it with `fedflame`, which only `main` imports, for model and data.

    python examples/flame_from_scratch.py

Symbols: client i with rows D_i, MoE layer l (L of them), expert j (E per layer), LoRA rank r, the model's
top-k K and the client's k_i <= K. The base model is a frozen OLMoE of transformers.
"""
# ruff: noqa: E741 (l is the layer, as in the paper)

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear, silu
from transformers import OlmoeForCausalLM

RANK, ALPHA, TEMPERATURE = 8, 16.0, 2.0
LEARNING_RATE, WEIGHT_DECAY = 3e-3, 0.0
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")

LoRA = tuple[Tensor, Tensor]  # A [r, in] and B [out, r]
Adapter = dict[tuple[int, int | None, str], LoRA]  # by (l, j, "gate") and so on; j is None for attention
Batch = Any  # has input_ids, attention_mask (0 at padding) and labels (-100 where there is no loss)


@dataclass
class Update:
    """What client i sends to the server after a round."""

    adapter: Adapter
    s: Tensor  # [L] rescalers s_{i,l}
    counts: Tensor  # [L, E] activation counts c_i[l,j]
    tokens: int  # T_i
    num_examples: int  # |D_i|
    active_experts: int  # k_i
    loss: float


def project(W: Tensor, lora: LoRA, x: Tensor) -> Tensor:
    """Compute W x + (alpha/r) B A x for rows x."""
    A, B = lora
    return linear(x, W) + ALPHA / RANK * linear(linear(x, A), B)


class AdaptedModel:
    """The frozen model with the adapter, the rescalers, the k and the counts of one client."""

    def __init__(self, model: OlmoeForCausalLM, adapter: Adapter, s: Tensor, k: int) -> None:
        self.model, self.adapter, self.s = model, adapter, s
        self.counts = torch.zeros(len(s), model.config.num_experts, dtype=torch.int64)  # of one batch
        self.not_padding = torch.zeros(0, dtype=torch.bool)
        for l, layer in enumerate(model.model.layers):
            layer.mlp.gate.top_k = k  # adaptive activation: the router picks the top k_i, not the top K
            layer.mlp.experts.forward = partial(self.mixture, l, layer.mlp.experts)
            for name in ATTENTION:
                projection = getattr(layer.self_attn, name)
                projection.forward = partial(project, projection.weight, adapter[l, None, name])

    def mixture(self, l: int, base: Any, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Compute y_l = s_{i,l} * sum_{j in top-k_i} p_j Expert_j(x), for x [tokens, hidden]."""
        y = torch.zeros_like(x)
        for j in range(self.counts.shape[1]):
            token, slot = torch.where(top_k_index == j)
            self.counts[l, j] = self.not_padding[token].sum()
            p = top_k_weights[token, slot, None]
            y = y.index_add(0, token, p * self.expert(l, j, base, x[token]))
        return self.s[l] * y

    def expert(self, l: int, j: int, base: Any, x: Tensor) -> Tensor:
        """Compute Expert_j(x) = down(silu(gate(x)) * up(x)); gate, up and down each have a LoRA pair."""
        W_gate, W_up = base.gate_up_proj[j].chunk(2)
        gate = project(W_gate, self.adapter[l, j, "gate"], x)
        up = project(W_up, self.adapter[l, j, "up"], x)
        return project(base.down_proj[j], self.adapter[l, j, "down"], silu(gate) * up)

    def loss(self, batch: Batch) -> Tensor:
        """Return the mean negative log-likelihood of the labelled tokens."""
        self.not_padding = batch.attention_mask.flatten().bool()
        logits = self.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        return cross_entropy(logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten())


@torch.no_grad()
def adamw_step(x: Tensor, moments: dict[Tensor, Any], weight_decay: float) -> None:
    """Update one tensor by AdamW. A tensor without an update keeps its value, its moments and its count n."""
    assert x.grad is not None
    n, m, v = moments.get(x, (0, torch.zeros_like(x), torch.zeros_like(x)))
    n, m, v = n + 1, 0.9 * m + 0.1 * x.grad, 0.999 * v + 0.001 * x.grad**2
    x *= 1 - LEARNING_RATE * weight_decay
    x -= LEARNING_RATE * (m / (1 - 0.9**n)) / ((v / (1 - 0.999**n)).sqrt() + 1e-8)
    moments[x], x.grad = (n, m, v), None


def train_client(
    model: OlmoeForCausalLM, start: Adapter, s: Tensor, k: int, num_examples: int, batches: Iterable[Batch]
) -> Update:
    """Train client i for one round: one step per batch, on the experts that saw a token of the batch."""
    adapter = {key: (A.clone().requires_grad_(), B.clone().requires_grad_()) for key, (A, B) in start.items()}
    s = s.clone().requires_grad_(k < model.config.num_experts_per_tok)  # at k_i = K it stays 1
    client = AdaptedModel(model, adapter, s, k)
    counts, tokens, losses, moments = torch.zeros_like(client.counts), 0, [], dict[Tensor, Any]()
    for batch in batches:
        loss = client.loss(batch)
        loss.backward()
        for (l, j, _), lora in adapter.items():
            if j is None or client.counts[l, j] > 0:
                for x in lora:
                    adamw_step(x, moments, WEIGHT_DECAY)
        if s.requires_grad:
            adamw_step(s, moments, weight_decay=0.0)
        counts += client.counts  # c_i[l,j], without padding
        tokens += int(batch.attention_mask.sum())  # T_i
        losses.append(loss.item())
    trained = {key: (A.detach(), B.detach()) for key, (A, B) in adapter.items()}
    return Update(trained, s.detach(), counts, tokens, num_examples, k, sum(losses) / len(losses))


def weighted_mean(values: Iterable[Tensor], weights: Sequence[float]) -> Tensor:
    """Return sum(w x) / sum(w)."""
    return torch.stack([w * x for w, x in zip(weights, values, strict=True)]).sum(0) / sum(weights)


def aggregate(start: Adapter, updates: Sequence[Update]) -> Adapter:
    """Aggregate by activation: A[l,j] = sum_i gamma_i A_i[l,j] / sum_i gamma_i; the same for B."""
    adapter = dict(start)
    for l, j, name in start:
        gamma = [float(update.num_examples) for update in updates]  # |D_i|, the whole weight for attention
        if j is not None:  # f_i[l,j]^t |D_i|, with the activation frequency f_i[l,j] = c_i[l,j] / T_i
            f = [update.counts[l, j].item() / update.tokens for update in updates]
            gamma = [f_i**TEMPERATURE * rows for f_i, rows in zip(f, gamma, strict=True)]
        if sum(gamma) > 0:  # an expert that no client activated stays unchanged
            A, B = zip(*(update.adapter[l, j, name] for update in updates), strict=True)
            adapter[l, j, name] = weighted_mean(A, gamma), weighted_mean(B, gamma)
    return adapter


def flame(
    model: OlmoeForCausalLM, adapter: Adapter, clients: Sequence[tuple[int, int]], rounds: int,
    batches: Callable[[int, int], Iterable[Batch]],
) -> Iterator[tuple[Adapter, dict[int, Tensor], list[Update]]]:  # fmt: skip
    """Yield adapter, s [L] of each tier and updates of each round, from 0 on; clients are (k_i, |D_i|)."""
    s = {k: torch.ones(model.config.num_hidden_layers) for k, _ in clients}
    yield adapter, dict(s), []
    for n in range(1, rounds + 1):
        updates = []
        for i, (k, num_examples) in enumerate(clients):
            updates.append(train_client(model, adapter, s[k], k, num_examples, batches(n, i)))
        adapter = aggregate(adapter, updates)
        for k in s:  # the tier's mean rescaler is used in its next round, and in evaluation at k
            tier = [update for update in updates if update.active_experts == k]
            s[k] = weighted_mean([update.s for update in tier], [update.num_examples for update in tier])
        yield adapter, dict(s), updates


def initial_adapter(model: OlmoeForCausalLM, seed: int) -> Adapter:
    """Draw A uniformly in +-1/sqrt(in) and set B to zero: the adapted model starts as the base model."""
    H, I, layers = model.config.hidden_size, model.config.intermediate_size, model.config.num_hidden_layers
    shapes: dict[tuple[int, int | None, str], tuple[int, int]] = {}
    for l, j in itertools.product(range(layers), range(model.config.num_experts)):
        shapes |= {(l, j, "gate"): (I, H), (l, j, "up"): (I, H), (l, j, "down"): (H, I)}
    shapes |= {(l, None, name): (H, H) for l in range(layers) for name in ATTENTION}
    rand = partial(torch.rand, generator=torch.Generator().manual_seed(seed))
    return {key: ((2 * rand(RANK, n) - 1) / n**0.5, torch.zeros(m, RANK)) for key, (m, n) in shapes.items()}


def main(model_name: str = "olmoe-tiny", rounds: int = 3, steps: int = 6) -> None:
    """Train four clients with k = K, K/2, K/4, 1 on different skills; print the held-out loss per round."""
    from fedflame.base.loading import load_base_model
    from fedflame.data.batches import collate, training_batches
    from fedflame.data.encoder import new_encoder, pad_token
    from fedflame.data.encoding import encode
    from fedflame.data.skills import instructions

    loaded, tokenizer = load_base_model(model_name, "float32")
    model: Any = loaded.requires_grad_(False)
    pad, full, encoder = pad_token(tokenizer), model.config.num_experts_per_tok, new_encoder(tokenizer, 96)
    held_out = collate([encode(row, encoder) for row in instructions(50, 0, "held_out")], pad)
    rows = [encode(r, encoder) for r in sorted(instructions(800, 0, "train"), key=lambda r: r.category)]

    def batches(n: int, i: int) -> Iterator[Batch]:
        return itertools.islice(training_batches(rows[200 * i :][:200], 8, pad, seed=4 * n + i), steps)

    clients = [(k, 200) for k in (full, full // 2, full // 4, 1)]
    for n, (adapter, s, _) in enumerate(flame(model, initial_adapter(model, 0), clients, rounds, batches)):
        with torch.no_grad():
            losses = {k: AdaptedModel(model, adapter, s[k], k).loss(held_out).item() for k in s}
        print(f"round {n}: held-out loss", ", ".join(f"{loss:.3f} at k={k}" for k, loss in losses.items()))


if __name__ == "__main__":
    main()
