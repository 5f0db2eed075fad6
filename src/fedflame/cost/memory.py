"""Estimate the memory that one client needs for training."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import astuple, dataclass

from fedflame.config.words import Checkpointed, Dtype
from fedflame.cost.adapter_size import adapter_parameters
from fedflame.cost.model_shape import ModelShape, attention_targets, base_parameters

# Bytes that norms, attention and its LoRA keep for the backward, per token, layer and unit of H. Measured
# with saved-tensor hooks on OLMoE with sdpa: 40.6 in fp32, 42.6 in bf16 (where norms keep fp32 copies).
_SAVED_BYTES_PER_WIDTH = 43


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


def base_bytes(shape: ModelShape, dtype: Dtype) -> int:
    """Return the bytes of the frozen base in this dtype."""
    return (4 if dtype == "float32" else 2) * base_parameters(shape)


def held_base_bytes(shape: ModelShape, r: int, dtype: Dtype) -> int:
    """Return the bytes of the frozen base with the room for LoRA of rank r beside its experts' weights.

    A weight [out,in] of an expert lies in a buffer [out+n,in+n]; see `moe.projection`.
    """
    size = 4 if dtype == "float32" else 2
    filled = r + -r % (16 // size)
    inner = shape.expert_matrices - 1
    projections = (
        (shape.expert_hidden_size, inner * shape.expert_size, inner * filled),
        (shape.expert_size, shape.expert_hidden_size, filled),
    )
    room = sum((into + n) * (out + n) - into * out for into, out, n in projections)
    return base_bytes(shape, dtype) + size * shape.moe_layers * shape.num_experts * room


def least_evaluation_memory(shape: ModelShape, r: int, target_modules: Collection[str], dtype: Dtype) -> int:
    """Return the bytes of the base in this dtype and of the adapter: the least that an evaluation takes.

    Raises:
        UserError: a target module is no attention projection of the model.
    """
    return held_base_bytes(shape, r, dtype) + 4 * adapter_parameters(shape, r, target_modules).total


def least_training_memory(
    shape: ModelShape, r: int, target_modules: Collection[str], dtype: Dtype, all_gradients: bool = False
) -> int:
    """Return the bytes that training takes at least, whatever k and the tokens of a step are.

    To those of an evaluation come the two moments in fp32 and the gradients of one layer: the optimizer frees
    them before those of the next layer are made. It keeps `all_gradients` where they are added up over
    batches or clipped by their norm.

    Raises:
        UserError: a target module is no attention projection of the model.
    """
    adapter = 4 * adapter_parameters(shape, r, target_modules).total
    gradients = adapter if all_gradients else adapter // len(shape.sparse_layers)
    return least_evaluation_memory(shape, r, target_modules, dtype) + 2 * adapter + gradients


def training_memory(
    shape: ModelShape,
    active_experts: int,
    r: int,
    target_modules: Collection[str],
    tokens_per_step: int,
    dtype: Dtype,
    labelled_share: float = 1.0,
    gradient_checkpointing: Checkpointed = "none",
    mask_width: int = 0,
    lora_dropout: bool = False,
) -> MemoryEstimate:
    """Estimate the peak memory of a training step: base in `dtype`, adapter, gradients and moments in fp32.

    The estimate of the activations is the sum of these parts:

    - a measured value for norms and attention,
    - for each active expert, gate and up before the activation (not if `experts` are checkpointed) and three
      rank-R products; shared and dense MLPs alike,
    - temporary rows of one layer,
    - the logits in `dtype`, in fp32, and their fp32 gradient,
    - with `lora_dropout`, a byte for every input of an A, and what is left of it in attention,
    - the attention mask, where rows share a sequence: a number in `dtype` and two truths for every token and
      each of the `mask_width` tokens of its sequence; all layers share it. 0: there is no mask.

    If `layers` are checkpointed, each layer keeps only its input, and one layer, the largest, also the first
    two parts. The estimate helps to choose tokens_per_step. It is not a bound.

    Raises:
        UserError: a target module is no attention projection of the model.
    """
    size = 4 if dtype == "float32" else 2
    adapter = 4 * adapter_parameters(shape, r, target_modules).total
    h, inner, layers = shape.hidden_size, shape.expert_size, len(shape.sparse_layers)
    matrices = shape.expert_matrices
    pre_activation = (matrices - 1) * inner * (gradient_checkpointing != "experts")
    sparse = size * (active_experts * (pre_activation + matrices * r) + 3 * shape.shared_size)
    dense = size * 3 * shape.dense_size
    targets = attention_targets(shape, target_modules)
    dropped = [p.fan_in * (1 + size) for layer in shape.attention for p in layer if p.name in targets]
    inputs = active_experts * (shape.expert_hidden_size + inner)
    dropout = float(lora_dropout * (sum(dropped) + shape.moe_layers * inputs))
    transient = size * active_experts * (2 * h + 3 * inner)
    logits = labelled_share * shape.vocab_size * (size + 8)
    norms_and_attention = _SAVED_BYTES_PER_WIDTH * h
    if gradient_checkpointing == "layers":
        kept = layers * size * h + norms_and_attention + max(sparse, dense)
        dropout /= layers
    else:
        kept = layers * norms_and_attention + shape.moe_layers * sparse + (layers - shape.moe_layers) * dense
    per_token = kept + dropout + transient + logits
    return MemoryEstimate(
        base=held_base_bytes(shape, r, dtype),
        adapter=adapter,
        gradients=adapter,
        optimizer=2 * adapter,
        activations=round(tokens_per_step * (per_token + mask_width * (size + 2))),
    )
