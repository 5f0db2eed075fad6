"""Train the adapter of a client on its rows with k_i experts per token, and count the activated experts."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fedflame.data.batches import Batch, batch_rows, training_batches
from fedflame.data.encoding import EncodedRow
from fedflame.messages import NOTHING, ClientUpdate, RoundPlan
from fedflame.moe.adapted_model import AdaptedModel
from fedflame.moe.rescaler import mass_ratio
from fedflame.seeds import derive_seed
from fedflame.training.optimizer import client_optimizer
from fedflame.training.regularizers import regularizer
from fedflame.training.schedule import learning_rates
from fedflame.training.steps import training_steps, unwatched
from fedflame.training.token_loss import decoded

MASS_BATCHES = 4
"""Batches on which the rescaler `mass` is measured: enough for a mean over about a thousand tokens."""


def unread(losses: list[float]) -> None:
    """What is done with the losses of steps where nobody reads them."""


def fine_tune(
    adapted: AdaptedModel,
    examples: Sequence[EncodedRow],
    plan: RoundPlan,
    pad_token_id: int,
    on_step: Callable[[int], None] = unwatched,
    on_losses: Callable[[list[float]], None] = unread,
) -> ClientUpdate:
    """Train one client for one round and return what it learned as a delta.

    Args:
        adapted: the base model; it loads the plan's adapter, rescalers and merged factors.
        examples: the client's rows.
        plan: what to train; the same plan and examples give the same bytes on the same machine.
        pad_token_id: pads batches on the right; padding is left out of attention, loss and counts.
        on_step: called after each batch with the number of its tokens.
        on_losses: called at the end with the loss of each optimizer step.

    Returns:
        The update, on the CPU whatever the device of the model. Between two steps nothing waits for a GPU,
        except in float16, whose loss scale depends on the gradients.

    Raises:
        UserError: the plan's k is not between 1 and the model's K, its values do not fit the model, rows of
            the model cannot share a sequence as the plan wants, or activations overflow in float16.
    """
    adapted.load(plan.adapter, plan.rescaler_values, plan.merged)
    if plan.rescaler == "mass":
        measured = measure_mass(adapted, _batches(examples, plan, pad_token_id), plan.active_experts)
        adapted.load(plan.adapter, measured, plan.merged)
    adapted.counts.reset()
    optimizer = client_optimizer(adapted, plan)
    start = adapted.beside(plan.adapter) if plan.proximal_mu else NOTHING
    step = training_steps(
        adapted,
        optimizer,
        lambda: regularizer(adapted.attached(), plan, start),
        on_step=on_step,
        router_aux_loss_coef=plan.router_aux_loss_coef,
    )
    rows, tokens = 0, 0
    losses: list[Tensor] = []  # they stay on the device until the round's end
    batches = _batches(examples, plan, pad_token_id)
    with adapted.training(plan.active_experts, plan.lora_dropout), _draws(adapted, plan) as begin_step:
        for number, rate in enumerate(learning_rates(plan, _steps(examples, plan))):
            begin_step(number)
            of_step = list(itertools.islice(batches, plan.gradient_accumulation_steps))
            optimizer.set_learning_rate(rate)
            losses.append(step(*of_step))
            rows += sum(batch.rows for batch in of_step)
            tokens += sum(batch.tokens for batch in of_step)
    loss_values = torch.stack(losses).tolist()
    on_losses(loss_values)
    del optimizer, step  # free the moments, twice the adapter's size, before the delta is made
    return ClientUpdate(
        round=plan.round,
        client=plan.client,
        active_experts=plan.active_experts,
        delta=adapted.learned_since(plan.adapter),
        rescaler_values=adapted.rescaler_values(),
        counts=adapted.counts.total.to("cpu", copy=True),
        tokens=tokens,
        num_examples=len(examples),
        trained_examples=min(rows, len(examples)),  # no row repeats before the epoch's end
        steps=len(losses),
        loss=sum(loss_values) / len(loss_values),
        trainable=plan.trainable,
    )


@torch.no_grad()
def measure_mass(adapted: AdaptedModel, batches: Iterator[Batch], k: int) -> Tensor:
    """Return [L]: the routing mass at the model's K divided by that at k, on `MASS_BATCHES` batches."""
    measured = list(itertools.islice(batches, MASS_BATCHES))
    at_full_k = _routing_mass(adapted, measured, adapted.num_experts_per_tok)
    return mass_ratio(at_full_k, _routing_mass(adapted, measured, k))


def _routing_mass(adapted: AdaptedModel, batches: Sequence[Batch], k: int) -> Tensor:
    """Return [L]: the sum of the routing weights over non-padding tokens, with k active experts."""
    masses = [torch.zeros((), device=lora.s.device) for lora in adapted.loras]
    real = torch.empty(0, dtype=torch.int64)

    def hook(index: int) -> Callable[..., None]:
        def add(module: nn.Module, inputs: object, output: tuple[Tensor, Tensor, Tensor]) -> None:
            masses[index] += output[1].index_select(0, real.to(output[1].device)).float().sum()

        return add

    handles = [layer.router.register_forward_hook(hook(index)) for index, layer in enumerate(adapted.layers)]
    try:
        with adapted.active_experts(k):
            for batch in batches:
                real = batch.attention_mask.reshape(-1).nonzero().flatten().to(adapted.device)
                decoded(adapted, batch.on(adapted.device))
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack([mass.cpu() for mass in masses])


@contextmanager
def _draws(adapted: AdaptedModel, plan: RoundPlan) -> Iterator[Callable[[int], object]]:
    """Within the block, what is called with a step's number seeds what the step draws, if it draws."""
    if not plan.lora_dropout:
        yield lambda number: None
        return
    cards = [device for device in adapted.devices if device.type == "cuda"]
    with torch.random.fork_rng(devices=cards):
        yield lambda number: torch.manual_seed(
            derive_seed(plan.seed, "dropout", plan.round, plan.client, number)
        )


def _steps(examples: Sequence[EncodedRow], plan: RoundPlan) -> int:
    """Return the optimizer steps of the round."""
    if not plan.num_train_epochs:
        return plan.max_steps
    order = plan.batch_size, _seed(plan), plan.tokens_per_step, plan.packed_length, plan.num_train_epochs
    batches = sum(1 for _ in batch_rows(examples, *order))
    return min(math.ceil(batches / plan.gradient_accumulation_steps), plan.max_steps)


def _batches(examples: Sequence[EncodedRow], plan: RoundPlan, pad_token_id: int) -> Iterator[Batch]:
    layout = plan.tokens_per_step, plan.packed_length, plan.padding_free, plan.num_train_epochs or math.inf
    return training_batches(examples, plan.batch_size, pad_token_id, _seed(plan), *layout)


def _seed(plan: RoundPlan) -> int:
    return derive_seed(plan.seed, "batches", plan.round, plan.client)
