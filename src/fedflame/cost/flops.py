"""Count the FLOPs of a forward pass and of a training step from the model's shape alone.

A multiply-add is 2 FLOPs. We count matrix products. We do not count element-wise operations (norms, softmax,
activation, rotation, rescaler) or the recomputation of gradient checkpointing. Attention scores are full
[S,S] products, without the causal half or a sliding window, as `torch.utils.flop_counter` counts them. S is
the length of a row; what packed rows add, scores between rows that count for nothing, is not counted.

Shapes: H hidden size, I expert width, E experts per layer, k active experts, R LoRA rank, S sequence length,
L MoE layers.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import astuple, dataclass

from fedflame.cost.attention import Projection, Projections
from fedflame.cost.model_shape import ModelShape, attention_targets


@dataclass(frozen=True)
class FlopTerms:
    """FLOPs per token, by term."""

    attention_projections: float = 0.0
    attention_scores: float = 0.0
    router: float = 0.0
    experts: float = 0.0
    expert_lora: float = 0.0
    attention_lora: float = 0.0
    shared_experts: float = 0.0
    dense_layers: float = 0.0
    head: float = 0.0

    @property
    def total(self) -> float:
        return float(sum(astuple(self)))


def forward_flops_per_token(
    shape: ModelShape,
    active_experts: int,
    r: int,
    target_modules: Collection[str],
    sequence_length: int,
    labelled_share: float = 1.0,
    head: bool = True,
) -> FlopTerms:
    """Return the FLOPs of one forward pass per token.

    Args:
        shape: the sizes of the model.
        active_experts: k, experts per token.
        r: rank of the expert LoRA and of the attention LoRA on `target_modules`; 0 means the base model.
        target_modules: attention projections with LoRA.
        sequence_length: S, tokens per sequence.
        labelled_share: share of the tokens that have a label; the head is applied only to these.
        head: whether to count the head.

    Raises:
        UserError: a target module is no attention projection of the model.
    """
    targets = attention_targets(shape, target_modules)
    layers = [
        _layer_forward(shape, attention, active_experts, r, targets, sequence_length, sparse)
        for attention, sparse in zip(shape.attention, shape.sparse_layers, strict=True)
    ]
    return _sum([*layers, FlopTerms(head=_head(shape, labelled_share) if head else 0.0)])


def training_flops_per_token(
    shape: ModelShape,
    active_experts: int,
    r: int,
    target_modules: Collection[str],
    sequence_length: int,
    labelled_share: float = 1.0,
) -> FlopTerms:
    """Return the FLOPs of forward and backward per token, with frozen base and routers.

    The arguments are those of `forward_flops_per_token`. The backward counts only what autograd must compute:

    - A frozen matrix gives the gradient of its input, which costs as much as its forward.
    - A LoRA pair also gives its weight gradients; in all this costs twice its forward.
    - The two score products give gradients of q, k, v and the softmax, which costs twice their forward.
    - No gradient flows to the embeddings. Modules that read the input of the first trained layer give no
      input gradient, and a frozen branch below the lowest LoRA has no backward.

    The optimizer is not counted.

    Raises:
        UserError: a target module is no attention projection of the model.
    """
    targets = attention_targets(shape, target_modules)
    terms = [
        forward_flops_per_token(shape, active_experts, r, targets, sequence_length, labelled_share),
        FlopTerms(head=_head(shape, labelled_share)),
    ]
    flows = False
    for attention, sparse in zip(shape.attention, shape.sparse_layers, strict=True):
        terms.append(_attention_backward(shape, attention, r, targets, sequence_length, flows))
        flows = flows or any(p.name in targets for p in attention)
        terms.append(_mlp_backward(shape, active_experts, r, sparse, flows))
        flows = flows or sparse
    return _sum(terms)


def _sum(terms: Sequence[FlopTerms]) -> FlopTerms:
    return FlopTerms(*(sum(column) for column in zip(*map(astuple, terms), strict=True)))


def _head(shape: ModelShape, labelled_share: float) -> float:
    return 2 * shape.hidden_size * shape.vocab_size * labelled_share


def _lora(p: Projection, r: int) -> int:
    return 2 * r * (p.fan_in + p.fan_out)


def _expert_lora(shape: ModelShape, r: int) -> int:
    return 2 * shape.expert_matrices * r * (shape.expert_hidden_size + shape.expert_size)


def _layer_forward(
    shape: ModelShape,
    attention: Projections,
    k: int,
    r: int,
    targets: Sequence[str],
    sequence_length: int,
    sparse: bool,
) -> FlopTerms:
    h = shape.hidden_size
    expert = shape.expert_matrices * shape.expert_hidden_size * shape.expert_size
    score_width = shape.num_attention_heads * (shape.qk_head_dim + shape.v_head_dim) * bool(attention)
    return FlopTerms(
        attention_projections=sum(2 * p.fan_in * p.fan_out for p in attention),
        attention_scores=2 * sequence_length * score_width,
        router=2 * h * shape.num_experts * sparse,
        experts=2 * k * expert * sparse,
        expert_lora=k * _expert_lora(shape, r) * sparse,
        attention_lora=sum(_lora(p, r) for p in attention if p.name in targets),
        shared_experts=(6 * h * shape.shared_size + 2 * h * shape.shared_gate) * sparse,
        dense_layers=6 * h * shape.dense_size * (not sparse),
    )


def _attention_backward(
    shape: ModelShape,
    attention: Projections,
    r: int,
    targets: Sequence[str],
    sequence_length: int,
    flows: bool,
) -> FlopTerms:
    """Count the backward of attention. `flows`: the layer's input needs a gradient, through q, k and v."""
    projections = lora = 0
    live = set("qkv") if flows else set()
    for p in attention:
        input_needs_gradient = bool(live & set(p.path))
        if input_needs_gradient:
            projections += 2 * p.fan_in * p.fan_out
        if p.name in targets:
            # Two weight gradients, the gradient between B and A, and that of A's input if it is needed.
            lora += _lora(p, r) + 2 * r * p.fan_out + 2 * r * p.fan_in * input_needs_gradient
            if p is not attention[-1]:
                live |= set(p.path)
    product = 2 * sequence_length * shape.num_attention_heads * bool(attention)
    scores = product * shape.qk_head_dim * (("q" in live) + ("k" in live))
    scores += product * shape.v_head_dim * (bool(live & {"q", "k"}) + ("v" in live))
    return FlopTerms(attention_projections=projections, attention_scores=scores, attention_lora=lora)


def _mlp_backward(shape: ModelShape, k: int, r: int, sparse: bool, flows: bool) -> FlopTerms:
    """Count the backward of the MLP. `flows`: its input needs a gradient; else only the experts have one."""
    h, lora = shape.hidden_size, _expert_lora(shape, r)
    if not sparse:
        return FlopTerms(dense_layers=6 * h * shape.dense_size * flows)
    width, first = shape.expert_hidden_size, shape.expert_matrices - 1
    matrix = 2 * width * shape.expert_size
    return FlopTerms(
        router=2 * h * shape.num_experts * flows,
        experts=k * (matrix + first * matrix * flows),
        # Weight gradients, then input gradients; those of A1 (gate and up) are gradients of the MLP's input.
        expert_lora=k * (lora + lora - 2 * first * r * width * (not flows)),
        shared_experts=(6 * h * shape.shared_size + 2 * h * shape.shared_gate) * flows,
    )
