"""The whole step of the benchmarks."""

from __future__ import annotations

import pytest
import torch
from tests.tiny_models import VOCABULARY, tiny_olmoe

from fedflame.base.files import model_config_path
from fedflame.bench.step import (
    LEARNING_RATE,
    WEIGHT_DECAY,
    adapt,
    labelled_batch,
    olmoe_config,
    product_flops,
    random_olmoe,
    step_flops,
    step_optimizer,
    training_step,
)
from fedflame.data.encoding import EncodedRow
from fedflame.messages import RoundPlan
from fedflame.training.fine_tune import fine_tune

ROWS, LENGTH = 3, 12
CONFIG = model_config_path("olmoe-tiny")


@pytest.mark.parametrize("k", [4, 1])
def test_a_step_is_that_of_a_client(k: int) -> None:
    batch = labelled_batch(VOCABULARY, ROWS, LENGTH)
    assert (batch.labels[:, 0] == -100).all() and (batch.labels[:, 1:] == batch.input_ids[:, 1:]).all()
    adapted, client = (adapt(tiny_olmoe()) for _ in range(2))
    start = client.adapter()
    loss = training_step(adapted, step_optimizer(adapted), batch, k)()
    plan = RoundPlan(
        round=0,
        client=0,
        seed=0,
        active_experts=k,
        rescaler="learned",
        rescaler_values=torch.ones(len(client.layers)),
        adapter=start,
        learning_rate=LEARNING_RATE,
        weight_decay=WEIGHT_DECAY,
        batch_size=ROWS,
        max_steps=1,
    )
    # A step does not depend on the order of its rows, but for the rounding of sums.
    update = fine_tune(client, [EncodedRow(row, 1, False) for row in batch.input_ids.tolist()], plan, 0)
    assert loss.item() == pytest.approx(update.loss, rel=1e-6)
    assert torch.equal(adapted.counts.total, update.counts)
    for name, delta in adapted.learned_since(start).tensors().items():
        torch.testing.assert_close(delta, update.delta.tensors()[name], rtol=0, atol=LEARNING_RATE / 100)
    assert any(value.any() for value in update.delta.tensors().values())


def test_a_step_can_be_built_without_memory_and_waits_for_nothing() -> None:
    config = olmoe_config(CONFIG, 3)
    adapted = adapt(random_olmoe(config, torch.bfloat16, "meta"), "experts")
    loss = training_step(adapted, step_optimizer(adapted), labelled_batch(config.vocab_size, 2, 16), 8)()
    assert loss.device.type == "meta" and len(adapted.layers) == 3


def test_balanced_routing_uses_more_experts_than_the_initial_one() -> None:
    config = olmoe_config(CONFIG, 4)
    used = []
    for balanced in (True, False):
        adapted = adapt(random_olmoe(config, torch.float32, "cpu", balanced))
        training_step(adapted, step_optimizer(adapted), labelled_batch(config.vocab_size, 2, 64), 1)()
        used.append(int((adapted.counts.total[-1] > 0).sum()))
    assert used[0] > used[1]


def test_the_flops_of_layers_and_rows_add_up() -> None:
    one, two, three = (step_flops(CONFIG, layers, 2, ROWS, LENGTH) for layers in (1, 2, 3))
    assert three - two == pytest.approx(two - one) and two > one
    assert step_flops(CONFIG, 2, 2, 2 * ROWS, LENGTH) == pytest.approx(2 * two)
    assert step_flops(CONFIG, 2, 4, ROWS, LENGTH) > two


def test_the_rate_of_a_product_is_positive() -> None:
    assert product_flops("cpu", 64) > 0
