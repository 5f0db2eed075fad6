"""Choose the device and the dtype of an experiment, and refuse what the memory of the cards cannot hold."""

from __future__ import annotations

import math

from fedflame.base.card_memory import (
    Need,
    evaluation_need,
    require_room,
    spread_if_needed,
    training_need,
    training_words,
)
from fedflame.base.device import ALL_CARDS, DeviceChoice, choose_device
from fedflame.base.dtype import DtypeChoice, choose_dtype
from fedflame.config.run_config import RunConfig
from fedflame.config.words import Dtype
from fedflame.cost.model_shape import ModelShape
from fedflame.errors import UserError


def place(
    config: RunConfig, shape: ModelShape, dtype: DtypeChoice | None = None, workers: int = 1
) -> tuple[DeviceChoice, DtypeChoice]:
    """Return the device and the dtype, before any weight is loaded.

    Args:
        config: the configuration, with `model.device` and `model.dtype`.
        shape: the sizes of the model.
        dtype: of the frozen base; None for what `model.dtype` says.
        workers: processes that train, each with a base of its own; 0 if nothing is trained here.

    Raises:
        UserError: see `choose_device`; the cards' memory cannot hold a base for every worker.
    """
    device = choose_device(config.model.device)
    choice = dtype or choose_dtype(config.model.dtype, shape, device)
    name = choice.name
    need = _training_need(config, shape, name) if workers else evaluation_need(shape, config.adapter, name)
    device = spread_if_needed(device, need)
    if device.name == ALL_CARDS and workers > 1:
        raise UserError(f"{workers} workers: {device.reason}, and all cards together serve one worker")
    copies = math.ceil(workers / len(device.cards)) if workers and device.cards else 1
    require_room(device, need, copies)
    return device, choice


def _training_need(config: RunConfig, shape: ModelShape, dtype: Dtype) -> Need:
    k, training = max(config.evaluated_experts(shape.num_experts_per_tok)), config.training
    batch = max(config.tokens_per_step()), training.per_device_train_batch_size, training.packing
    holds = training.holds_gradients or config.privacy.unit != "none"
    words = training_words(k, *batch, training.gradient_checkpointing)
    return training_need(shape, config.adapter, dtype, words, holds)
