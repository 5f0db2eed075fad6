"""The optimizer steps of a client's round."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.amp import GradScaler

from fedflame.data.batches import Batch, PlacedBatch
from fedflame.errors import UserError
from fedflame.moe.adapted_model import AdaptedModel
from fedflame.moe.expert_adamw import ExpertAdamW
from fedflame.training.captured import CapturedSteps
from fedflame.training.token_loss import token_losses

LOSS_SCALE = 2.0**12
"""Loss scale at the start of a round in float16. A scale that is too large skips steps, which a short round
cannot afford: torch's default of 2^16 skips two of the embedded model's first four steps. With 2^12 only
gradients below 1e-11 are lost."""


def nothing() -> float:
    """The regularizer of a plan that asks for none."""
    return 0.0


def unwatched(tokens: int) -> None:
    """What is done after each batch where nobody looks."""


def training_steps(
    adapted: AdaptedModel,
    optimizer: ExpertAdamW,
    regularizer: Callable[[], Tensor | float] = nothing,
    capture: bool = True,
    on_step: Callable[[int], None] = unwatched,
    router_aux_loss_coef: float = 0.0,
) -> Callable[..., Tensor]:
    """Return a function that takes one optimizer step on one or several batches.

    Several batches count as one: their gradients are added up, each labelled token alike. The function
    returns the mean loss of the labelled tokens, without what is added to it, on the device of the model. On
    one GPU, unless `capture` is false, steps on one batch are captured where its sizes come again; see
    `training.captured`.

    Args:
        adapted: the model.
        optimizer: of its adapter and rescalers.
        regularizer: a term that is added to the objective of every step.
        capture: whether steps may be captured.
        on_step: called after each batch with the number of its tokens.
        router_aux_loss_coef: this times the load-balancing loss of each batch is added to its loss.
    """
    scaler = GradScaler(adapted.device.type, LOSS_SCALE, enabled=adapted.dtype == "float16")
    step = _Step(adapted, optimizer, scaler, regularizer, on_step, router_aux_loss_coef)
    if not capture or not adapted.can_capture or scaler.is_enabled():  # its scale is read in every step
        return step
    changed = list(adapted.attached().tensors().values())
    captured = CapturedSteps(lambda batch: step.on([batch], [1.0], nothing), changed)

    def one_captured(*batches: Batch) -> Tensor:
        if len(batches) > 1:
            return step(*batches)
        loss = captured(batches[0].in_few_sizes(adapted.device))
        on_step(batches[0].tokens)
        return loss

    return one_captured


@dataclass(frozen=True)
class _Step:
    adapted: AdaptedModel
    optimizer: ExpertAdamW
    scaler: GradScaler
    regularizer: Callable[[], Tensor | float]
    on_step: Callable[[int], None]
    router_aux_loss_coef: float

    def __call__(self, *batches: Batch) -> Tensor:
        """Run one optimizer step on all of these batches."""
        labelled = [len(batch.targets) for batch in batches]
        tokens = iter([batch.tokens for batch in batches])
        placed = [batch.on(self.adapted.device) for batch in batches]
        shares = [count / sum(labelled) for count in labelled]
        return self.on(placed, shares, lambda: self.on_step(next(tokens)))

    def on(
        self, batches: Sequence[PlacedBatch], shares: Sequence[float], after_each: Callable[[], object]
    ) -> Tensor:
        """Run one optimizer step. The counts are added also if the scaler skips the update."""
        counts = self.adapted.counts
        whole, touched = torch.zeros((), device=self.adapted.device), counts.untouched()
        try:
            for at, (batch, share) in enumerate(zip(batches, shares, strict=True), 1):
                counts.begin_step(batch.real_tokens, batch.counted)
                loss, objective = self._losses(batch, share)
                touched = touched | counts.touched()
                if at < len(batches):
                    self.scaler.scale(self._checked(objective)).backward()
                else:
                    self._update(objective + self.regularizer(), touched)
                counts.end_step()
                whole = whole + loss.detach()
                after_each()
        finally:
            # The next step or client uses this model too: nothing of a failed or skipped step may remain.
            counts.abandon_step()
            self.adapted.model.zero_grad()
        return whole

    def _losses(self, batch: PlacedBatch, share: float) -> tuple[Tensor, Tensor]:
        """Return the batch's share of the mean loss, and of the objective without the regularizer."""
        if not self.router_aux_loss_coef:
            loss = share * batch.mean(token_losses(self.adapted, batch))
            return loss, loss
        with (balancing := self.adapted.load_balancing).recorded():
            loss = share * batch.mean(token_losses(self.adapted, batch))
        added = balancing.loss(batch.real_tokens, batch.counted).to(loss.device)
        return loss, loss + share * self.router_aux_loss_coef * added

    def _update(self, objective: Tensor, touched: Tensor) -> None:
        if not self.scaler.is_enabled():
            self.optimizer.backward(objective, touched)
            return
        self.scaler.scale(self._checked(objective)).backward()
        # The scaler uses only `param_groups` and `step` of an optimizer.
        self.scaler.step(self.optimizer, touched)  # type: ignore[arg-type]
        self.scaler.update()

    def _checked(self, loss: Tensor) -> Tensor:
        if self.scaler.is_enabled() and not loss.isfinite():
            raise UserError(
                f"the loss is {loss.item()} in float16, whose largest number is 65504; "
                "try model.dtype=bfloat16 or float32"
            )
        return loss
