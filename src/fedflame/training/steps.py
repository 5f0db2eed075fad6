"""The optimizer steps of a client's round."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

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


def training_steps(
    adapted: AdaptedModel,
    optimizer: ExpertAdamW,
    regularizer: Callable[[], Tensor | float] = nothing,
    capture: bool = True,
) -> Callable[[Batch], Tensor]:
    """Return a function that takes one optimizer step on a batch.

    It returns the mean loss of the labelled tokens, without the regularizer, on the device of the model. On
    one GPU, unless `capture` is false, steps on batches of sizes that come again are captured; see
    `training.captured`.
    """
    scaler = GradScaler(adapted.device.type, LOSS_SCALE, enabled=adapted.dtype == "float16")
    step = _Step(adapted, optimizer, scaler, regularizer)
    if capture and adapted.can_capture and not scaler.is_enabled():  # its scale is read in every step
        captured = CapturedSteps(step, list(adapted.attached().tensors().values()))
        return lambda batch: captured(batch.in_few_sizes(adapted.device))
    return lambda batch: step(batch.on(adapted.device))


@dataclass(frozen=True)
class _Step:
    adapted: AdaptedModel
    optimizer: ExpertAdamW
    scaler: GradScaler
    regularizer: Callable[[], Tensor | float]

    def __call__(self, batch: PlacedBatch) -> Tensor:
        """Run one optimizer step. The counts are added also if the scaler skips the update."""
        counts = self.adapted.counts
        counts.begin_step(batch.real_tokens, batch.counted)
        try:
            loss = batch.mean(token_losses(self.adapted, batch))
            objective = loss + self.regularizer()
            touched = counts.touched()
            if self.scaler.is_enabled():
                self._scaled(objective, touched)
            else:
                self.optimizer.backward(objective, touched)
            counts.end_step()
        finally:
            # The next step or client uses this model too: nothing of a failed or skipped step may remain.
            counts.abandon_step()
            self.adapted.model.zero_grad()
        return loss.detach()

    def _scaled(self, loss: Tensor, touched: Tensor) -> None:
        if not loss.isfinite():
            raise UserError(
                f"the loss is {loss.item()} in float16, whose largest number is 65504; "
                "try model.dtype=bfloat16 or float32"
            )
        self.scaler.scale(loss).backward()
        # The scaler uses only `param_groups` and `step` of an optimizer.
        self.scaler.step(self.optimizer, touched)  # type: ignore[arg-type]
        self.scaler.update()
