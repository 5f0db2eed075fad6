"""Train the adapter of a client so that its update tells little of any row (DP-SGD).

In every step the client samples its rows, each by itself, scales down the gradient of each row, adds Gaussian
noise to the sum, on every value of every expert, and takes a step of AdamW that moves all of them. Weight
decay and the terms of a method enter after the noise. What leaves the client follows from these noised sums,
from the plan and from the number of rows alone; see `privacy.release`.

Abadi et al.: Deep Learning with Differential Privacy, arXiv 1607.00133.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from fedflame.data.encoding import EncodedRow
from fedflame.messages import NOTHING, Adapter, ClientUpdate, RoundPlan
from fedflame.moe.adapted_model import AdaptedModel
from fedflame.privacy.noise import Noise
from fedflame.privacy.release import released
from fedflame.privacy.terms import terms_of
from fedflame.training.clipped_sums import clipped_sums, require_clippable, trained_values
from fedflame.training.optimizer import client_optimizer
from fedflame.training.regularizers import regularizer
from fedflame.training.schedule import learning_rates
from fedflame.training.steps import unwatched


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
        UserError: see `training.fine_tune`, `privacy.terms.terms_of` and `require_clippable`.
    """
    terms = terms_of(plan, len(units))
    require_clippable(adapted, plan.clipping)
    adapted.load(plan.adapter, plan.rescaler_values, plan.merged)
    optimizer = client_optimizer(adapted, plan)
    trained = trained_values(adapted)
    start = adapted.beside(plan.adapter) if plan.proximal_mu else NOTHING
    all_experts = ~adapted.counts.untouched()
    with adapted.training(plan.active_experts):
        for step, rate in enumerate(learning_rates(plan, plan.max_steps)):
            chosen = [units[number] for number in noise.sample(len(units), terms.sampling_rate, step)]
            sums = clipped_sums(adapted, chosen, plan.clip_norm, plan.clipping, pad_token_id)
            noised = noise.added_to(sums, terms.noise_multiplier * plan.clip_norm, step)
            _add_regularizer(adapted, plan, start)
            for name, value in trained.items():
                mean = noised[name] / terms.expected_units
                value.grad = mean if value.grad is None else value.grad + mean
            optimizer.set_learning_rate(rate)
            optimizer.step(all_experts)
            on_step(sum(len(row.ids) for unit in chosen for row in unit))
    learned = adapted.learned_since(plan.adapter), adapted.rescaler_values()
    return released(plan, terms, sum(map(len, units)), *learned, all_experts.shape)


def _add_regularizer(adapted: AdaptedModel, plan: RoundPlan, start: Adapter) -> None:
    """Leave on the values the gradient of the terms that the method adds, which no row changes."""
    term = regularizer(adapted.attached(), plan, start)
    if isinstance(term, Tensor):
        term.backward()
