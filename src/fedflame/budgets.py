"""What a client pays for k active experts: FLOPs, bytes and memory, from the model's shape alone.

A multiply-add is 2 FLOPs. Matrix products are counted; element-wise work (norms, softmax, activation,
rotation, rescaler) and recomputation (gradient checkpointing) are not. Attention scores are whole [S,S]
products, no causal half and no sliding window: so counts `torch.utils.flop_counter`, too.

Shape legend: H hidden size, I expert width, E experts per layer, k active experts, R LoRA rank,
S sequence length, L MoE layers.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import astuple, dataclass

from fedflame.choices import Checkpointed, Dtype, Trainable, UpdateDtype
from fedflame.errors import UserError
from fedflame.model_shape import ModelShape, Projection, base_parameters, read_model_shape

__all__ = [
    "AdapterSize",
    "FlopTerms",
    "MemoryEstimate",
    "ModelShape",
    "Tier",
    "TierCost",
    "adapter_parameters",
    "base_parameters",
    "forward_flops_per_token",
    "read_model_shape",
    "tier_costs",
    "training_flops_per_token",
    "training_memory",
    "validate_tiers",
]

_VALUE_BYTES: dict[UpdateDtype, int] = {"float32": 4, "bfloat16": 2, "int8": 1}

# What backward needs of norms, attention and its LoRA, in bytes per token, layer and unit of H. Measured
# with saved-tensor hooks on OLMoE with sdpa: 40.6 in fp32, 42.6 in bf16 (where norms keep fp32 copies).
_SAVED_BYTES_PER_WIDTH = 43


@dataclass(frozen=True)
class FlopTerms:
    """FLOPs per token, term by term."""

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


@dataclass(frozen=True)
class AdapterSize:
    """Values of one adapter and bytes of one client's round, file headers left out."""

    experts: int
    attention: int
    rescalers: int
    counts: int
    matrices: int
    """A and B of each module; gate and up of an expert are one module."""

    @property
    def total(self) -> int:
        """LoRA parameters; the rescalers come on top."""
        return self.experts + self.attention

    @property
    def bytes_down(self) -> int:
        """The whole adapter and the rescalers in fp32."""
        return 4 * (self.total + self.rescalers)

    def bytes_up(self, update_dtype: UpdateDtype) -> int:
        """An upper bound, since experts without a token are not sent; with the int64 counts."""
        scales = 4 * self.matrices if update_dtype == "int8" else 0
        return _VALUE_BYTES[update_dtype] * self.total + scales + 4 * self.rescalers + 8 * self.counts


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that one client holds at the peak of a training step."""

    base: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        return sum(astuple(self))


@dataclass(frozen=True)
class Tier:
    """The clients that train with the same number of active experts and the same rank."""

    active_experts: int
    rank: int
    clients: int


@dataclass(frozen=True)
class TierCost:
    """What each client of a tier pays: FLOPs per token, bytes per round."""

    active_experts: int
    rank: int
    """Of the LoRA that is trained, down and up."""
    clients: int
    forward_flops_per_token: float
    relative_to_full: float
    """Forward FLOPs over those at the model's own num_experts_per_tok and the run's rank."""
    training_flops_per_token: float
    bytes_down: int
    bytes_up: int


def forward_flops_per_token(
    shape: ModelShape,
    active_experts: int,
    r: int,
    target_modules: Collection[str],
    sequence_length: int,
    labelled_share: float = 1.0,
    head: bool = True,
) -> FlopTerms:
    """FLOPs of one forward pass per token of a sequence of S tokens.

    r is the rank of the expert LoRA and of the attention LoRA on `target_modules`; 0 for the base model.
    The head runs at labelled positions only: `labelled_share` of the tokens.
    """
    targets = _targets(shape, target_modules)
    layers = [
        _layer_forward(shape, active_experts, r, targets, sequence_length, sparse)
        for sparse in shape.sparse_layers
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
    """FLOPs of forward and backward per token, with base and routers frozen.

    Backward is what autograd must do and no more: a frozen matrix gives its input gradient (as much as
    its forward), a LoRA pair also its weight gradients (twice its forward in all), the two score products
    a gradient to each of q, k, v and the softmax (twice their forward). Nothing flows to the embeddings:
    what reads the input of the first trained layer gives no input gradient, and a frozen branch below
    the lowest LoRA has no backward at all. The optimizer is not counted.
    """
    targets = _targets(shape, target_modules)
    terms = [
        forward_flops_per_token(shape, active_experts, r, targets, sequence_length, labelled_share),
        FlopTerms(head=_head(shape, labelled_share)),
    ]
    flows = False
    for sparse in shape.sparse_layers:
        terms.append(_attention_backward(shape, r, targets, sequence_length, flows))
        flows = flows or bool(targets)
        terms.append(_mlp_backward(shape, active_experts, r, sparse, flows))
        flows = flows or sparse
    return _sum(terms)


def adapter_parameters(
    shape: ModelShape, r: int, target_modules: Collection[str], half: Trainable = "both"
) -> AdapterSize:
    """Sizes of banks A1, B1, A2, B2 and of A [R,in], B [out,R] (`messages.Adapter`), or of a half of them."""
    targets, inner = _targets(shape, target_modules), shape.expert_matrices - 1
    pairs = [(shape.expert_hidden_size, shape.expert_size)] * inner
    expert = _low_rank([*pairs, (shape.expert_size, shape.expert_hidden_size)], r, half)
    attention = _low_rank([(p.fan_in, p.fan_out) for p in shape.attention if p.name in targets], r, half)
    return AdapterSize(
        experts=shape.moe_layers * shape.num_experts * expert,
        attention=len(shape.sparse_layers) * attention,
        rescalers=shape.moe_layers,
        counts=shape.moe_layers * shape.num_experts,
        matrices=(2 if half == "both" else 1)
        * (2 * shape.moe_layers * shape.num_experts + len(shape.sparse_layers) * len(targets)),
    )


def _low_rank(projections: Sequence[tuple[int, int]], r: int, half: Trainable) -> int:
    """Values of the LoRA on projections (in, out)."""
    return sum(r * (fan_in * (half != "B") + fan_out * (half != "A")) for fan_in, fan_out in projections)


def training_memory(
    shape: ModelShape,
    active_experts: int,
    r: int,
    target_modules: Collection[str],
    tokens_per_step: int,
    dtype: Dtype,
    labelled_share: float = 1.0,
    gradient_checkpointing: Checkpointed = "none",
) -> MemoryEstimate:
    """Base in `dtype`; adapter, gradients and AdamW's two moments in fp32; an estimate of activations.

    Activations: the measured share of norms and attention, then per expert choice what the expert function
    keeps (gate and up before the activation unless `experts` are checkpointed, three rank-R products),
    shared and dense MLPs likewise; of checkpointed `layers` the input, and all that for the largest of
    them; one layer's transient rows, and the logits in `dtype`, in fp32 and as fp32 gradient. It guides the
    choice of tokens_per_step; it is no bound.
    """
    size = 4 if dtype == "float32" else 2
    adapter = 4 * adapter_parameters(shape, r, target_modules).total
    h, inner, layers = shape.hidden_size, shape.expert_size, len(shape.sparse_layers)
    matrices = shape.expert_matrices
    pre_activation = (matrices - 1) * inner * (gradient_checkpointing != "experts")
    sparse = size * (active_experts * (pre_activation + matrices * r) + 3 * shape.shared_size)
    dense = size * 3 * shape.dense_size
    transient = size * active_experts * (2 * h + 3 * inner)
    logits = labelled_share * shape.vocab_size * (size + 8)
    norms_and_attention = _SAVED_BYTES_PER_WIDTH * h
    if gradient_checkpointing == "layers":
        kept = layers * size * h + norms_and_attention + max(sparse, dense)
    else:
        kept = layers * norms_and_attention + shape.moe_layers * sparse + (layers - shape.moe_layers) * dense
    per_token = kept + transient + logits
    return MemoryEstimate(
        base=size * base_parameters(shape),
        adapter=adapter,
        gradients=adapter,
        optimizer=2 * adapter,
        activations=round(tokens_per_step * per_token),
    )


def validate_tiers(tiers: Sequence[Tier], shape: ModelShape) -> None:
    """Raises UserError for a number of active experts that the model cannot run."""
    full = shape.num_experts_per_tok
    for tier in tiers:
        if not 1 <= tier.active_experts <= full:
            raise UserError(
                f"active_experts {tier.active_experts}: must be between 1 and {full} "
                "(the model's num_experts_per_tok)"
            )


def tier_costs(
    shape: ModelShape,
    tiers: Sequence[Tier],
    r: int,
    target_modules: Collection[str],
    sequence_length: int,
    labelled_share: float = 1.0,
    halves: Sequence[Trainable] = ("both",),
    update_dtype: UpdateDtype = "float32",
) -> list[TierCost]:
    """One row per tier, in the order given.

    r is the rank of the run, which `relative_to_full` is taken to. A method trains and sends `halves` in
    turn, as `update_dtype`: the largest of them counts. FLOPs are those of both halves.
    """
    validate_tiers(tiers, shape)
    setting = (target_modules, sequence_length, labelled_share)
    full = forward_flops_per_token(shape, shape.num_experts_per_tok, r, *setting).total
    costs = []
    for tier in tiers:
        sizes = [adapter_parameters(shape, tier.rank, target_modules, half) for half in halves]
        forward = forward_flops_per_token(shape, tier.active_experts, tier.rank, *setting).total
        training = training_flops_per_token(shape, tier.active_experts, tier.rank, *setting).total
        costs.append(
            TierCost(
                active_experts=tier.active_experts,
                rank=tier.rank,
                clients=tier.clients,
                forward_flops_per_token=forward,
                relative_to_full=forward / full,
                training_flops_per_token=training,
                bytes_down=adapter_parameters(shape, tier.rank, target_modules).bytes_down,
                bytes_up=max(size.bytes_up(update_dtype) for size in sizes),
            )
        )
    return costs


def _targets(shape: ModelShape, target_modules: Collection[str]) -> frozenset[str]:
    names = [p.name for p in shape.attention]
    for module in target_modules:
        if module not in names:
            raise UserError(
                f"target_modules {module!r}: must be attention projections of {shape.model_type}: "
                f"{', '.join(names)}"
            )
    return frozenset(target_modules)


def _sum(terms: Sequence[FlopTerms]) -> FlopTerms:
    return FlopTerms(*(sum(column) for column in zip(*map(astuple, terms), strict=True)))


def _head(shape: ModelShape, labelled_share: float) -> float:
    return 2 * shape.hidden_size * shape.vocab_size * labelled_share


def _lora(p: Projection, r: int) -> int:
    return 2 * r * (p.fan_in + p.fan_out)


def _expert_lora(shape: ModelShape, r: int) -> int:
    return 2 * shape.expert_matrices * r * (shape.expert_hidden_size + shape.expert_size)


def _layer_forward(
    shape: ModelShape, k: int, r: int, targets: frozenset[str], sequence_length: int, sparse: bool
) -> FlopTerms:
    h = shape.hidden_size
    expert = shape.expert_matrices * shape.expert_hidden_size * shape.expert_size
    score_width = shape.num_attention_heads * (shape.qk_head_dim + shape.v_head_dim)
    return FlopTerms(
        attention_projections=sum(2 * p.fan_in * p.fan_out for p in shape.attention),
        attention_scores=2 * sequence_length * score_width,
        router=2 * h * shape.num_experts * sparse,
        experts=2 * k * expert * sparse,
        expert_lora=k * _expert_lora(shape, r) * sparse,
        attention_lora=sum(_lora(p, r) for p in shape.attention if p.name in targets),
        shared_experts=(6 * h * shape.shared_size + 2 * h * shape.shared_gate) * sparse,
        dense_layers=6 * h * shape.dense_size * (not sparse),
    )


def _attention_backward(
    shape: ModelShape, r: int, targets: frozenset[str], sequence_length: int, flows: bool
) -> FlopTerms:
    """`flows`: the layer's input needs a gradient. Only q, k or v that carry one pass it on."""
    projections = lora = 0
    live = set("qkv") if flows else set()
    for p in shape.attention:
        input_needs_gradient = bool(live & set(p.path))
        if input_needs_gradient:
            projections += 2 * p.fan_in * p.fan_out
        if p.name in targets:
            # Both weight gradients, the gradient between B and A, and that of A's input if it is needed.
            lora += _lora(p, r) + 2 * r * p.fan_out + 2 * r * p.fan_in * input_needs_gradient
            if p is not shape.attention[-1]:
                live |= set(p.path)
    product = 2 * sequence_length * shape.num_attention_heads
    scores = product * shape.qk_head_dim * (("q" in live) + ("k" in live))
    scores += product * shape.v_head_dim * (bool(live & {"q", "k"}) + ("v" in live))
    return FlopTerms(attention_projections=projections, attention_scores=scores, attention_lora=lora)


def _mlp_backward(shape: ModelShape, k: int, r: int, sparse: bool, flows: bool) -> FlopTerms:
    """`flows`: the MLP's input needs a gradient; without it only the experts' insides have a backward."""
    h, lora = shape.hidden_size, _expert_lora(shape, r)
    if not sparse:
        return FlopTerms(dense_layers=6 * h * shape.dense_size * flows)
    width, first = shape.expert_hidden_size, shape.expert_matrices - 1
    matrix = 2 * width * shape.expert_size
    return FlopTerms(
        router=2 * h * shape.num_experts * flows,
        experts=k * (matrix + first * matrix * flows),
        # Weight gradients, then input gradients; those of A1, gate and up, reach the MLP's input.
        expert_lora=k * (lora + lora - 2 * first * r * width * (not flows)),
        shared_experts=(6 * h * shape.shared_size + 2 * h * shape.shared_gate) * flows,
    )
