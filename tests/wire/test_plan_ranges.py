"""Plans that no training can follow are refused when they are read, whatever else is right about them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from tests.message_samples import a_plan, assert_same_message
from torch import Tensor

from fedflame.errors import InvalidMessage
from fedflame.messages import NOTHING, Adapter, RoundPlan
from fedflame.wire.codec import decode_plan, encode_plan

PLAN = a_plan()
"""5 experts, rank 3, hidden size 7, expert width 4; attention is [3,6] and [9,3]."""
MERGED = a_plan(seed=1).adapter
BILLIONS = 2**31

RANGES: dict[str, tuple[float, float]] = {
    "round": (1, BILLIONS),
    "client": (0, BILLIONS),
    "seed": (0, 2**63 - 1),
    "active_experts": (1, 5),
    "learning_rate": (0, 1e6),
    "weight_decay": (0, 1e6),
    "batch_size": (1, BILLIONS),
    "max_steps": (1, BILLIONS),
    "tokens_per_step": (0, BILLIONS),
    "gradient_accumulation_steps": (1, BILLIONS),
    "num_train_epochs": (0, 1e6),
    "warmup_rounds": (0, BILLIONS),
    "max_grad_norm": (0, 1e6),
    "lora_dropout": (0, 0.99),
    "router_aux_loss_coef": (0, 1e6),
    "packed_length": (0, BILLIONS),
    "proximal_mu": (0, 1e6),
    "rank_penalty": (0, 1e6),
    "kept_rank": (0, 3),
}


def with_values(values: Mapping[str, Tensor]) -> RoundPlan:
    return replace(PLAN, adapter=Adapter.from_tensors(PLAN.adapter.tensors() | values))


def refusal_of(plan: RoundPlan) -> str:
    with pytest.raises(InvalidMessage) as refusal:
        decode_plan(encode_plan(plan))
    return str(refusal.value)


@pytest.mark.parametrize(("name", "least", "most"), [(name, *ends) for name, ends in RANGES.items()])
def test_a_number_at_the_ends_of_its_range_is_read_and_one_beyond_is_refused(
    name: str, least: float, most: float
) -> None:
    for value in (least, most):
        plan = replace(PLAN, **{name: value})
        assert_same_message(decode_plan(encode_plan(plan)), plan)
    for value in (least - 1, most + 1):
        reason = refusal_of(replace(PLAN, **{name: value}))
        assert reason.startswith(
            (f"plan with {name} = {value}; {least} to ", f"{name} is an integer of more")
        )


@pytest.mark.parametrize("name", ["learning_rate", "weight_decay", "proximal_mu", "rank_penalty"])
def test_what_is_no_number_is_in_no_range(name: str) -> None:
    assert refusal_of(replace(PLAN, **{name: math.nan})).startswith(f"plan with {name} = nan; ")


@pytest.mark.parametrize("values", [torch.ones(2, 1), torch.tensor(1.0), torch.ones(2, dtype=torch.float64)])
def test_rescalers_that_are_no_vector_of_float32_are_refused(values: Tensor) -> None:
    reason = refusal_of(replace(PLAN, rescaler_values=values))
    assert reason == "plan whose rescaler_values are no float32 vector"


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("experts.0.A1", torch.ones(6, 7), "float32 (6, 7)"),
        ("experts.1.B2", torch.ones(5, 7, 3, 1), "float32 (5, 7, 3, 1)"),
        ("experts.1.B2", torch.ones(5, 7, 3, dtype=torch.bfloat16), "bfloat16 (5, 7, 3)"),
        ("attention.layers.0.q_proj.A", torch.ones(1, 3, 6), "float32 (1, 3, 6)"),
        ("attention.layers.0.q_proj.B", torch.ones(9, 3, dtype=torch.float64), "float64 (9, 3)"),
    ],
)
def test_a_value_of_other_dimensions_or_of_another_dtype_is_refused(
    name: str, value: Tensor, shown: str
) -> None:
    assert refusal_of(with_values({name: value})) == f"plan with adapter value {name} as torch.{shown}"
    merged = Adapter.from_tensors(MERGED.tensors() | {name: value})
    assert refusal_of(replace(PLAN, merged=merged)) == f"plan with merged value {name} as torch.{shown}"


@pytest.mark.parametrize(
    ("name", "value", "rank"),
    [
        ("experts.0.A1", torch.ones(5, 9, 7), 9),
        ("experts.0.B1", torch.ones(5, 8, 6), 6),
        ("experts.1.B2", torch.ones(5, 7, 2), 2),
        ("attention.layers.0.q_proj.A", torch.ones(6, 6), 6),
        ("attention.layers.0.q_proj.B", torch.ones(9, 2), 2),
    ],
)
def test_a_factor_of_another_rank_than_the_others_is_refused(name: str, value: Tensor, rank: int) -> None:
    wanted = f"value {name} of rank {rank} beside rank 3"
    assert refusal_of(with_values({name: value})) == f"plan with adapter {wanted}"
    merged = Adapter.from_tensors(MERGED.tensors() | {name: value})
    assert refusal_of(replace(PLAN, merged=merged)) == f"plan with merged {wanted}"


def test_experts_without_a_gate_have_the_rank_once_in_their_first_factor() -> None:
    plan = with_values({f"experts.{layer}.A1": torch.ones(5, 3, 7) for layer in range(2)})
    assert_same_message(decode_plan(encode_plan(plan)), plan)


def test_a_plan_without_an_adapter_of_experts_is_refused() -> None:
    assert refusal_of(replace(PLAN, adapter=NOTHING)) == "plan without an adapter"
    assert refusal_of(replace(PLAN, adapter=PLAN.adapter.with_rank(0))) == "plan without an adapter"


def test_banks_that_differ_in_their_number_of_experts_are_refused() -> None:
    reason = refusal_of(with_values({"experts.1.B2": torch.ones(4, 7, 3)}))
    assert reason == "plan whose banks differ in their number of experts"
