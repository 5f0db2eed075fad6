"""The client: train the adapter on local rows with k_i experts per token, and say what was used."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fedflame.data.batches import IGNORE_INDEX, Batch, EncodedRow, training_batches
from fedflame.messages import ClientUpdate, RoundPlan
from fedflame.moe.adapted_model import AdaptedModel
from fedflame.moe.expert_adamw import ExpertAdamW
from fedflame.moe.rescaler import mass_ratio
from fedflame.regularizers import add_proximal_gradient, add_rank_penalty_gradient
from fedflame.seeds import derive_seed
from fedflame.token_loss import token_loss

MASS_BATCHES = 4
"""Batches on which `mass` measures the routers: enough for a mean over a thousand tokens or so."""


def fine_tune(
    adapted: AdaptedModel,
    examples: Sequence[EncodedRow],
    plan: RoundPlan,
    pad_token_id: int,
    on_step: Callable[[int], None] = lambda tokens: None,
) -> ClientUpdate:
    """Train one client for one round and return what it learned as a delta.

    Args:
        adapted: the resident model; its adapter, rescalers and merged factors become the plan's.
        examples: the client's rows.
        plan: what to train; the same plan and examples give the same bytes.
        pad_token_id: fills batches on the right, hidden from attention, loss and counts.
        on_step: called after each optimizer step with the step's tokens.

    Raises:
        UserError: the plan asks for a k that the model does not have, or for values that do not fit it.
    """
    adapted.load(plan.adapter, plan.rescaler_values, plan.merged)
    if plan.rescaler == "mass":
        measured = measure_mass(adapted, _batches(examples, plan, pad_token_id), plan.active_experts)
        adapted.load(plan.adapter, measured, plan.merged)
    adapted.counts.reset()
    optimizer = _optimizer(adapted, plan)
    tokens, losses = 0, []
    with adapted.training(plan.active_experts):
        for batch in itertools.islice(_batches(examples, plan, pad_token_id), plan.max_steps):
            losses.append(_train_step(adapted, optimizer, batch, plan))
            tokens += batch.tokens
            on_step(batch.tokens)
    return ClientUpdate(
        round=plan.round,
        client=plan.client,
        active_experts=plan.active_experts,
        delta=adapted.adapter().combine(plan.adapter, torch.sub),
        rescaler_values=adapted.rescaler_values(),
        counts=adapted.counts.total.clone(),
        tokens=tokens,
        num_examples=len(examples),
        steps=len(losses),
        loss=sum(losses) / len(losses),
        trainable=plan.trainable,
    )


def token_losses(adapted: AdaptedModel, batch: Batch) -> Tensor:
    """Negative log-likelihood of each labelled token in nats, rows of the batch one after another.

    The output embedding is applied at labelled positions only, most of its cost for instructions.
    """
    decoder = adapted.model.get_decoder()
    output = decoder(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    labels = batch.labels[:, 1:]
    labelled = labels != IGNORE_INDEX

    def logits(states: Tensor) -> Tensor:
        output.last_hidden_state = states.unsqueeze(0)
        with _returning(decoder, output):
            of_states: Tensor = adapted.model(input_ids=batch.input_ids[:1], use_cache=False).logits[0]
        return of_states

    return token_loss(output.last_hidden_state[:, :-1][labelled], labels[labelled], logits)


@contextmanager
def _returning(module: nn.Module, output: object) -> Iterator[None]:
    """Within the block the module returns `output` at once.

    So the model itself does to hidden states and logits what its family does (scaling, caps).
    """
    module.forward = lambda *_, **__: output
    try:
        yield
    finally:
        del module.forward


@torch.no_grad()
def measure_mass(adapted: AdaptedModel, batches: Iterator[Batch], k: int) -> Tensor:
    """[L] routing mass at the model's K over that at k, from the first `MASS_BATCHES` batches."""
    measured = list(itertools.islice(batches, MASS_BATCHES))
    at_full_k = _routing_mass(adapted, measured, adapted.num_experts_per_tok)
    return mass_ratio(at_full_k, _routing_mass(adapted, measured, k))


def _routing_mass(adapted: AdaptedModel, batches: Sequence[Batch], k: int) -> Tensor:
    """[L] summed routing weight over the tokens that are not padding, with k active experts."""
    mass = torch.zeros(len(adapted.layers))
    mask = torch.empty(0, dtype=torch.bool)

    def hook(index: int) -> Callable[..., None]:
        def add(module: nn.Module, inputs: object, output: tuple[Tensor, Tensor, Tensor]) -> None:
            mass[index] += output[1][mask].float().sum().cpu()

        return add

    handles = [layer.router.register_forward_hook(hook(index)) for index, layer in enumerate(adapted.layers)]
    try:
        with adapted.active_experts(k):
            for batch in batches:
                mask = batch.attention_mask.reshape(-1).bool()
                adapted.model.get_decoder()(
                    input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
                )
    finally:
        for handle in handles:
            handle.remove()
    return mass


def _optimizer(adapted: AdaptedModel, plan: RoundPlan) -> ExpertAdamW:
    learned = plan.rescaler == "learned"
    scalars = [lora.s for lora in adapted.loras]
    for s in scalars:
        s.requires_grad_(learned)
    adapted.set_trainable(plan.trainable)
    return ExpertAdamW(
        adapted.loras,
        [parameter for parameter in adapted.attention.values() if parameter.requires_grad],
        plan.learning_rate,
        plan.weight_decay,
        unregularized=scalars if learned else [],
    )


def _train_step(adapted: AdaptedModel, optimizer: ExpertAdamW, batch: Batch, plan: RoundPlan) -> float:
    """One optimizer step; returns the batch's mean response loss, without `regularizers`."""
    adapted.counts.begin_step(batch.attention_mask)
    try:
        loss = token_losses(adapted, batch).mean()
        loss.backward()
        if plan.proximal_mu:
            add_proximal_gradient(adapted.attached(), plan.adapter, plan.proximal_mu)
        if plan.rank_penalty:
            add_rank_penalty_gradient(adapted.attached(), plan.kept_rank, plan.rank_penalty)
        optimizer.step(adapted.counts.end_step())
    except BaseException:
        # The rounds go on with this model: no half step may reach the next client or an evaluation.
        adapted.counts.abandon_step()
        adapted.model.zero_grad()
        raise
    return float(loss.detach())


def _batches(examples: Sequence[EncodedRow], plan: RoundPlan, pad_token_id: int) -> Iterator[Batch]:
    seed = derive_seed(plan.seed, "batches", plan.round, plan.client)
    return training_batches(examples, plan.batch_size, pad_token_id, seed)
