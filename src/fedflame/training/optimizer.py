"""What a client trains by a plan, and the optimizer of it."""

from __future__ import annotations

from fedflame.messages import RoundPlan
from fedflame.moe.adapted_model import AdaptedModel
from fedflame.moe.expert_adamw import ExpertAdamW


def client_optimizer(adapted: AdaptedModel, plan: RoundPlan) -> ExpertAdamW:
    """Return the optimizer of a plan, after the model's values are set to be trained or not."""
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
        max_grad_norm=plan.max_grad_norm,
    )
