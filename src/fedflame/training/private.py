"""Train the adapter of a client so that its update tells little of any row (DP-SGD).

In every step the client samples its rows, each by itself, scales down the gradient of each row, adds Gaussian
noise to the sum, on every value of every expert, and takes a step of AdamW that moves all of them. Weight
decay and the terms of a method enter after the noise. What leaves the client follows from these noised sums,
from the plan and from the number of rows alone; see `privacy.release`.

Abadi et al.: Deep Learning with Differential Privacy, arXiv 1607.00133.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fedflame.data.batches import collate
from fedflame.data.encoding import EncodedRow
from fedflame.errors import UserError
from fedflame.messages import NOTHING, Adapter, ClientUpdate, RoundPlan
from fedflame.moe.adapted_model import AdaptedModel
from fedflame.privacy.clipping import add_clipped
from fedflame.privacy.noise import Noise
from fedflame.privacy.release import released
from fedflame.privacy.terms import terms_of
from fedflame.training.optimizer import client_optimizer
from fedflame.training.regularizers import regularizer
from fedflame.training.schedule import learning_rates
from fedflame.training.steps import unwatched
from fedflame.training.token_loss import token_losses


def fine_tune_privately(
    adapted: AdaptedModel,
    units: Sequence[Sequence[EncodedRow]],
    plan: RoundPlan,
    pad_token_id: int,
    noise: Noise,
    on_step: Callable[[int], None] = unwatched,
) -> ClientUpdate:
    """Train one client for one private round; see `training.fine_tune`.

    Args:
        adapted: the base model; it loads the plan's adapter, rescalers and merged factors.
        units: the client's rows; those of a unit are sampled and clipped together: one row, or a person's.
        plan: what to train, and the terms of its privacy.
        pad_token_id: of the tokenizer.
        noise: the client's secret draws for this answer.
        on_step: called after each step with the number of its tokens.

    Raises:
        UserError: see `training.fine_tune` and `privacy.terms.terms_of`; or the model is in float16, which
            skips steps that overflow.
    """
    terms = terms_of(plan, len(units))
    if adapted.dtype == "float16":
        raise UserError("a private round in float16 would skip steps that overflow; set model.dtype=bfloat16")
    adapted.load(plan.adapter, plan.rescaler_values, plan.merged)
    optimizer = client_optimizer(adapted, plan)
    trained = _trained(adapted)
    start = adapted.beside(plan.adapter) if plan.proximal_mu else NOTHING
    all_experts = ~adapted.counts.untouched()
    with adapted.training(plan.active_experts):
        for step, rate in enumerate(learning_rates(plan, plan.max_steps)):
            chosen = [units[number] for number in noise.sample(len(units), terms.sampling_rate, step)]
            sums = _clipped_sums(adapted, trained, chosen, plan.clip_norm, pad_token_id)
            deviation = terms.noise_multiplier * plan.clip_norm
            _add_regularizer(adapted, plan, start)
            for name, value in trained.items():
                drawn = noise.normal(value.shape, step, name).to(value.device)
                of_step = (sums[name] + deviation * drawn) / plan.batch_size
                value.grad = of_step if value.grad is None else value.grad + of_step
            optimizer.set_learning_rate(rate)
            optimizer.step(all_experts)
            on_step(sum(len(row.ids) for unit in chosen for row in unit))
    learned = adapted.learned_since(plan.adapter), adapted.rescaler_values()
    return released(plan, terms, sum(map(len, units)), *learned, all_experts.shape)


def _trained(adapted: AdaptedModel) -> dict[str, nn.Parameter]:
    """Return what is trained by name: LoRA values and learned rescalers."""
    values: dict[str, nn.Parameter] = dict(adapted.attached().tensors())  # type: ignore[arg-type]
    values |= {f"{lora.index}.s": lora.s for lora in adapted.loras}
    return {name: value for name, value in values.items() if value.requires_grad}


def _clipped_sums(
    adapted: AdaptedModel,
    trained: dict[str, nn.Parameter],
    units: Sequence[Sequence[EncodedRow]],
    clip_norm: float,
    pad_token_id: int,
) -> dict[str, Tensor]:
    """Return by name the sum of the units' clipped gradients; one is the mean over its rows."""
    sums = {name: torch.zeros_like(value) for name, value in trained.items()}
    for unit in units:
        gradient = {name: torch.zeros_like(value) for name, value in trained.items()}
        for row in unit:
            loss = token_losses(adapted, collate([row], pad_token_id)).mean() / len(unit)
            of_row = torch.autograd.grad(loss, list(trained.values()))
            for total, value in zip(gradient.values(), of_row, strict=True):
                total += value
        add_clipped(sums, gradient, clip_norm)
    return sums


def _add_regularizer(adapted: AdaptedModel, plan: RoundPlan, start: Adapter) -> None:
    """Leave on the values the gradient of the terms that the method adds, which no row changes."""
    term = regularizer(adapted.attached(), plan, start)
    if isinstance(term, Tensor):
        term.backward()
