"""The FLOPs of a step, as torch counts them: those of the planner."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.tiny_models import ATTENTION, LAYERS, PAD, RANK, TOP_K, WIDTH, tiny_adapted
from tests.training.one_client import plan_for
from torch.utils.flop_counter import FlopCounterMode

from fedflame.cost.flops import training_flops_per_token
from fedflame.cost.model_shape import read_model_shape
from fedflame.data.encoding import EncodedRow
from fedflame.training.fine_tune import fine_tune


def grouped_mm_flops(a: tuple[int, int], b: tuple[int, ...], *_: object, **__: object) -> int:
    """Of [S,in] times [E,in,out], and of [a,S] times [S,b]: torch's counter has no formula for it."""
    return 2 * a[0] * a[1] * b[-1]


@pytest.mark.parametrize("target_modules", [ATTENTION, ("k_proj",)])
@pytest.mark.parametrize("k", [1, 2, TOP_K])
def test_a_step_costs_what_the_planner_says(k: int, target_modules: tuple[str, ...], tmp_path: Path) -> None:
    adapted = tiny_adapted(target_modules=target_modules)
    adapted.model.config.save_pretrained(tmp_path)
    adapted.model.set_attn_implementation("eager")  # the counter counts the CPU's fused attention as 0
    length, labelled, count = 10, 5, 3
    examples = [EncodedRow(list(range(3, 3 + length)), length - labelled, False)] * count
    plan = plan_for(adapted, active_experts=k, batch_size=count, max_steps=1)
    with FlopCounterMode(
        display=False, custom_mapping={torch.ops.aten._grouped_mm: grouped_mm_flops}
    ) as counter:
        update = fine_tune(adapted, examples, plan, PAD)
    shape = read_model_shape(tmp_path)
    planned = training_flops_per_token(shape, k, RANK, target_modules, length, labelled / length)
    assert update.tokens == length * count
    # B1 is multiplied with gate and up side by side, in three products: half of each is zeros.
    zeros = 3 * 2 * (2 * WIDTH) * RANK * k * LAYERS * update.tokens
    assert 0 <= counter.get_total_flops() - planned.total * update.tokens <= zeros
