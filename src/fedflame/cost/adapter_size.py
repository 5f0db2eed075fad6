"""Count the values of an adapter, and the bytes of one client's round."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from fedflame.config.words import Trainable, UpdateDtype
from fedflame.cost.model_shape import ModelShape, attention_targets

_VALUE_BYTES: dict[UpdateDtype, int] = {"float32": 4, "bfloat16": 2, "int8": 1}


@dataclass(frozen=True)
class AdapterSize:
    """The numbers of values of one adapter, and the bytes of one client's round without headers."""

    experts: int
    attention: int
    rescalers: int
    counts: int
    matrices: int
    """Number of matrices A and B; gate and up of an expert count as one module."""

    @property
    def total(self) -> int:
        """Number of LoRA parameters, without rescalers."""
        return self.experts + self.attention

    @property
    def bytes_down(self) -> int:
        """Bytes of the whole adapter and the rescalers in fp32."""
        return 4 * (self.total + self.rescalers)

    def bytes_up(self, update_dtype: UpdateDtype) -> int:
        """Return the most bytes of an update, with int64 counts. Experts without a token are not sent."""
        scales = 4 * self.matrices if update_dtype == "int8" else 0
        return _VALUE_BYTES[update_dtype] * self.total + scales + 4 * self.rescalers + 8 * self.counts


def adapter_parameters(
    shape: ModelShape, r: int, target_modules: Collection[str], half: Trainable = "both"
) -> AdapterSize:
    """Count the values of an adapter (`messages.Adapter`) of rank r, or of its half A or B.

    Raises:
        UserError: a target module is no attention projection of the model.
    """
    targets, inner = attention_targets(shape, target_modules), shape.expert_matrices - 1
    pairs = [(shape.expert_hidden_size, shape.expert_size)] * inner
    expert = _low_rank([*pairs, (shape.expert_size, shape.expert_hidden_size)], r, half)
    attention = [(p.fan_in, p.fan_out) for layer in shape.attention for p in layer if p.name in targets]
    return AdapterSize(
        experts=shape.moe_layers * shape.num_experts * expert,
        attention=_low_rank(attention, r, half),
        rescalers=shape.moe_layers,
        counts=shape.moe_layers * shape.num_experts,
        matrices=(2 if half == "both" else 1) * (2 * shape.moe_layers * shape.num_experts + len(attention)),
    )


def _low_rank(projections: Sequence[tuple[int, int]], r: int, half: Trainable) -> int:
    """Return the number of LoRA values on projections (in, out)."""
    return sum(r * (fan_in * (half != "B") + fan_out * (half != "A")) for fan_in, fan_out in projections)
