"""What a site does with a plan that its file allows: it trains, or scores rows of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fedflame.base.card_memory import evaluation_need, training_need, training_words
from fedflame.base.device import DeviceChoice
from fedflame.base.out_of_memory import memory_in_words, training_memory_in_words
from fedflame.cost.flops import forward_flops_per_token, training_flops_per_token
from fedflame.cost.refused_families import require_trainable
from fedflame.data.encoder import pad_token
from fedflame.data.encoding import EncodedRow
from fedflame.messages import EvaluationPlan, RoundPlan
from fedflame.privacy.noise import Noise
from fedflame.trainer.disclosure import disclosed, disclosed_scores
from fedflame.trainer.job import TrainingJob
from fedflame.trainer.limits import (
    largest_batch,
    memory_needed,
    most_scored_tokens,
    require_allowed,
    require_enough,
    require_enough_scored,
    require_flops,
    require_memory,
    require_scoring_allowed,
    scoring_memory_needed,
    time_limit,
)
from fedflame.trainer.model import Ready, SiteModel
from fedflame.trainer.site import Site
from fedflame.training.error_feedback import Residuals, encode_with_feedback
from fedflame.training.fine_tune import fine_tune
from fedflame.training.private import fine_tune_privately
from fedflame.training.score_tests import score_tests
from fedflame.wire.codec import encode_evaluation


class Work:
    """Carries out plans with the site's model, within the limits of the site's file."""

    def __init__(self, site: Site, model: SiteModel, device: DeviceChoice) -> None:
        self._site, self._model, self._device = site, model, device

    def require_training_allowed(self, job: TrainingJob, plan: RoundPlan) -> None:
        """Raise Refusal if the site's file does not allow the job or the plan, before anything is loaded."""
        require_allowed(self._site, job, plan)
        self._model.require_same(job)
        require_trainable(self._model.shape(job).model_type, plan.packs, plan.router_aux_loss_coef)
        tokens = plan.most_tokens(plan.max_steps, job.max_length)
        require_flops(self._site.limits, lambda: tokens * self.flops_per_token(job, plan))
        self._require_memory(job, plan, 0)

    def require_scoring_allowed(self, job: TrainingJob, plan: EvaluationPlan, rows: int) -> None:
        """Raise Refusal if the site's file does not allow to score so many rows, before it loads."""
        require_scoring_allowed(self._site, job, plan, rows)
        self._model.require_same(job)
        tokens = most_scored_tokens(job, plan, rows)
        require_flops(self._site.limits, lambda: tokens * self._scoring_flops_per_token(job, plan))
        needed = scoring_memory_needed(self._model.shape(job), job, plan, self._device)
        require_memory(self._site.limits, self._device, needed)

    def train(
        self,
        job: TrainingJob,
        plan: RoundPlan,
        state: Path,
        units: Sequence[Sequence[int]] = (),
        noise: Noise | None = None,
    ) -> bytes:
        """Return the encoded update.

        Args:
            job: the model and the encoding of rows.
            plan: what to train.
            state: the folder of the run.
            units: of a private round, the numbers of the rows that are protected together.
            noise: the secret draws of a private round; None for any other.

        Raises:
            Refusal: the round takes too much memory or time, or its update would tell too much.
            UserError: the model cannot be loaded, or does not fit the plan.
        """
        on_step, limits = time_limit(self._site.limits), self._site.limits
        ready, checkpointing = self._ready_to_train(job, plan), self._site.trainer.gradient_checkpointing
        self._require_memory(job, plan, largest_batch(plan, ready.rows))
        with training_memory_in_words(ready.adapted.model.device, plan, checkpointing):
            if noise is None:
                update = fine_tune(ready.adapted, ready.rows, plan, pad_token(ready.tokenizer), on_step)
            else:
                rows = _by_unit(ready.by_number, units)
                setting = rows, plan, pad_token(ready.tokenizer), noise, on_step
                update = fine_tune_privately(ready.adapted, *setting)
        update = replace(update, num_examples=self._model.num_examples)  # as the site described itself
        require_enough(limits, update)
        # What stays here until it is summed is told to nobody.
        told = update if plan.secure_aggregation else disclosed(update, limits.disclosure)
        residuals = Residuals(state / "residuals")
        return encode_with_feedback(told, plan, residuals, limits.max_update_norm)

    def score(self, job: TrainingJob, plan: EvaluationPlan) -> bytes:
        """Return the encoded sums.

        Raises:
            Refusal: it takes too much time, or the sums would tell too much.
            UserError: the model cannot be loaded, or does not fit the plan.
        """
        on_batch, limits = time_limit(self._site.limits), self._site.limits
        need = evaluation_need(self._model.shape(job), job.adapter, job.dtype)
        ready = self._model.loaded(job, need)
        tests = self._model.tests(ready, plan.max_new_tokens)
        require_enough_scored(limits, len(tests.rows), sum(row.labelled for row in tests.encoded))
        with memory_in_words(ready.adapted.model.device, f"evaluating at k = {plan.active_experts}", ""):
            evaluation = score_tests(ready.adapted, tests, plan, on_batch)
        return encode_evaluation(disclosed_scores(evaluation, limits.disclosure))

    def _ready_to_train(self, job: TrainingJob, plan: RoundPlan) -> Ready:
        checkpointing = self._site.trainer.gradient_checkpointing
        batch = plan.tokens_per_step, plan.batch_size, plan.packed_length > 0
        work = training_words(plan.active_experts, *batch, checkpointing)
        shape = self._model.shape(job)
        return self._model.loaded(
            job, training_need(shape, job.adapter, job.dtype, work, plan.holds_gradients)
        )

    def _require_memory(self, job: TrainingJob, plan: RoundPlan, batch_tokens: int) -> None:
        """Raise Refusal if a round with so many tokens in its largest batch takes more than allowed."""
        checkpointing = self._site.trainer.gradient_checkpointing
        setting = job, plan, batch_tokens, checkpointing, self._device
        require_memory(self._site.limits, self._device, memory_needed(self._model.shape(job), *setting))

    def flops_per_token(self, job: TrainingJob, plan: RoundPlan) -> float:
        """Return the FLOPs of a token that is trained on."""
        setting = (plan.adapter.rank, job.adapter.target_modules, plan.longest_sequence(job.max_length))
        return training_flops_per_token(self._model.shape(job), plan.active_experts, *setting).total

    def _scoring_flops_per_token(self, job: TrainingJob, plan: EvaluationPlan) -> float:
        setting = (plan.adapter.rank, job.adapter.target_modules, job.max_length + plan.max_new_tokens)
        return forward_flops_per_token(self._model.shape(job), plan.active_experts, *setting).total


def _by_unit(rows: Sequence[EncodedRow | str], units: Sequence[Sequence[int]]) -> list[list[EncodedRow]]:
    """Return the rows of each unit. One that cannot be used is sampled like any other, and adds nothing."""
    return [[row for number in unit if not isinstance(row := rows[number], str)] for unit in units]
