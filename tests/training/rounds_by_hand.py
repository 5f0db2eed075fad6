"""What a round must come to, from the stock model: its gradients, its first loss, the mass of its experts."""

from __future__ import annotations

import torch
from tests.tiny_models import LAYERS, PAD, exact_token_losses, merged, router_logits, with_active_experts
from torch import Tensor

from fedflame.data.batches import Batch, collate
from fedflame.data.encoding import EncodedRow
from fedflame.messages import RoundPlan
from fedflame.moe.adapted_model import AdaptedModel


def gradients_of_a_merged_model(adapted: AdaptedModel, k: int, batch: Batch) -> dict[str, Tensor]:
    """Of every LoRA value and s by the chain rule, from the stock model in float64."""
    oracle = merged(adapted, with_active_experts(k))
    exact_token_losses(oracle, batch).mean().backward()
    scaling, adapter, gradients = adapted.loras[0].scaling, adapted.adapter(), {}
    for layer, s in enumerate(adapted.rescaler_values().double()):
        a1, b1, a2, b2 = (adapter.experts[f"{layer}.{bank}"].double() for bank in ("A1", "B1", "A2", "B2"))
        experts = oracle.model.layers[layer].mlp.experts
        halves = zip(a1.chunk(2, 1), b1.chunk(2, 1), experts.gate_up_proj.grad.chunk(2, 1), strict=True)
        down = s * experts.down_proj.grad
        pairs = [(scaling * b.mT @ w, scaling * w @ a.mT) for a, b, w in halves]
        gradients[f"experts.{layer}.A1"] = torch.cat([a for a, _ in pairs], 1)
        gradients[f"experts.{layer}.B1"] = torch.cat([b for _, b in pairs], 1)
        gradients[f"experts.{layer}.A2"] = scaling * b2.mT @ down
        gradients[f"experts.{layer}.B2"] = scaling * down @ a2.mT
        gradients[f"s.{layer}"] = (experts.down_proj.grad * experts.down_proj).sum().detach() / s
    for name in adapter.attention:
        module, part = name.rsplit(".", 1)
        weight = oracle.get_parameter(f"{module}.weight").grad
        a, b = (adapter.attention[f"{module}.{other}"].double() for other in "AB")
        gradients[f"attention.{name}"] = scaling * (b.mT @ weight if part == "A" else weight @ a.mT)
    return gradients


def exact_first_loss(adapted: AdaptedModel, examples: list[EncodedRow], plan: RoundPlan, s: Tensor) -> float:
    adapted.load(plan.adapter, s)
    with torch.no_grad():
        oracle = merged(adapted, with_active_experts(plan.active_experts))
        return exact_token_losses(oracle, collate(examples, PAD)).mean().item()


def mass_by_hand(k: int, batches: list[Batch]) -> Tensor:
    """Per layer, the sum over real tokens of the k largest softmax values, in the stock model with k."""
    masses = torch.zeros(LAYERS, dtype=torch.float64)
    for batch in batches:
        real = batch.attention_mask.flatten().bool()
        for layer, logits in enumerate(router_logits(with_active_experts(k), batch)):
            probabilities = logits[real].double().softmax(-1)
            masses[layer] += probabilities.sort(descending=True).values[:, :k].sum()
    return masses
