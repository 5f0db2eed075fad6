"""Forward FLOPs of OLMoE-1B-7B beside FLAME's own figures; prints the tables that docs/flops.md quotes.

PYTHONPATH=src python benchmarks/flops/olmoe_1b_7b.py
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

from fedflame.cost.flops import FlopTerms, forward_flops_per_token, training_flops_per_token
from fedflame.cost.model_shape import ModelShape, read_model_shape

CONFIG = Path(__file__).parents[2] / "configs" / "models" / "OLMoE-1B-7B-0924"
TIERS = (8, 4, 2, 1)
TOKENS = 128
RANK = 16
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
PAPER = {8: 342.8, 1: 158.0}
PER_EXPERT = (PAPER[8] - PAPER[1]) / 7
CONSTANT = PAPER[1] - PER_EXPERT


def giga(flops_per_token: float) -> float:
    return flops_per_token * TOKENS / 1e9


def row(*cells: object) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def head(*cells: str) -> str:
    return row(*cells) + "\n" + row("---", *["---:"] * (len(cells) - 1))


def terms_table(shape: ModelShape) -> list[str]:
    forward = {k: forward_flops_per_token(shape, k, RANK, TARGETS, TOKENS) for k in TIERS}
    training = {k: training_flops_per_token(shape, k, RANK, TARGETS, TOKENS) for k in TIERS}
    lines = [head(f"GFLOP for {TOKENS} tokens, r = {RANK}", *(f"k = {k}" for k in TIERS))]
    for field in fields(FlopTerms):
        values = [giga(getattr(forward[k], field.name)) for k in TIERS]
        if any(values):
            lines.append(row(field.name.replace("_", " "), *(f"{value:.2f}" for value in values)))
    full = forward[8].total
    lines.append(row("**forward**", *(f"**{giga(forward[k].total):.1f}**" for k in TIERS)))
    lines.append(row("of k = 8", *(f"{forward[k].total / full:.3f}" for k in TIERS)))
    lines.append(row("paper, forward", *(PAPER.get(k, "-") for k in TIERS)))
    fits = [CONSTANT + k * PER_EXPERT for k in TIERS]
    lines.append(row("paper, 131.6 + 26.4 k", *(f"{fit:.1f}" for fit in fits)))
    lines.append(row("paper, of k = 8", *(f"{fit / PAPER[8]:.3f}" for fit in fits)))
    lines.append(
        row("**training, forward and backward**", *(f"**{giga(training[k].total):.1f}**" for k in TIERS))
    )
    lines.append(row("of k = 8", *(f"{training[k].total / training[8].total:.3f}" for k in TIERS)))
    return lines


def per_expert_table(shape: ModelShape) -> list[str]:
    one = forward_flops_per_token(shape, 1, RANK, TARGETS, TOKENS)
    matrices, lora = giga(one.experts), giga(one.expert_lora)
    # One operation per element: SiLU and product, LoRA scaled and added, routing weight and sum.
    h, inner = shape.hidden_size, shape.expert_size
    elementwise = giga(shape.moe_layers * (2 * inner + 2 * (2 * inner + h) + 2 * h))
    return [
        head("One more active expert, GFLOP", "cost", "sum"),
        row("three matrices", f"{matrices:.3f}", f"{matrices:.3f}"),
        row(f"their LoRA, r = {RANK}", f"{lora:.3f}", f"{matrices + lora:.3f}"),
        row(
            "element-wise work (not in our count)",
            f"{elementwise:.3f}",
            f"{matrices + lora + elementwise:.3f}",
        ),
        row("paper, (342.8 - 158.0) / 7", "", f"{PER_EXPERT:.3f} ± 0.014"),
    ]


def slope_table(shape: ModelShape) -> list[str]:
    lines = [head("Which tokens and rank give 26.400 ± 0.014", "GFLOP per expert")]
    for tokens, r in ((128, 8), (128, 16), (128, 32), (131, 0)):
        one, two = (forward_flops_per_token(shape, k, r, (), tokens).total for k in (1, 2))
        lines.append(row(f"forward, {tokens} tokens, r = {r}", f"{(two - one) * tokens / 1e9:.3f}"))
    for tokens, r in ((64, 8), (64, 16)):
        one, two = (training_flops_per_token(shape, k, r, TARGETS, tokens).total for k in (1, 2))
        lines.append(
            row(f"forward and backward, {tokens} tokens, r = {r}", f"{(two - one) * tokens / 1e9:.3f}")
        )
    return lines


def constant_table(shape: ModelShape) -> list[str]:
    one = forward_flops_per_token(shape, 1, RANK, TARGETS, TOKENS)
    ours = giga(one.total - one.experts - one.expert_lora)
    candidates = {
        "embedding counted as a product with a one-hot row": 2 * shape.hidden_size * shape.vocab_size,
        "one expert more than k": one.experts + one.expert_lora,
        "2 x active parameters: embedding in, scores out": 2 * shape.hidden_size * shape.vocab_size
        - one.attention_scores,
        "causal half of the scores left out": -one.attention_scores / 2,
        "attention LoRA left out": -one.attention_lora,
        "LoRA on the router": 2 * RANK * (shape.hidden_size + shape.num_experts) * shape.moe_layers,
        "LoRA on the head": 2 * RANK * (shape.hidden_size + shape.vocab_size),
        "head left out": -one.head,
    }
    lines = [head("Constant part, GFLOP", "change", "constant", "paper minus this")]
    lines.append(row("ours", "", f"{ours:.2f}", f"{CONSTANT - ours:.2f}"))
    for name, change in candidates.items():
        constant = ours + giga(change)
        lines.append(row(name, f"{giga(change):+.2f}", f"{constant:.2f}", f"{CONSTANT - constant:.2f}"))
    return lines


def main() -> None:
    shape = read_model_shape(CONFIG)
    tables = (terms_table(shape), per_expert_table(shape), slope_table(shape), constant_table(shape))
    print("\n\n".join("\n".join(table) for table in tables))


if __name__ == "__main__":
    main()
