"""What leaves a client that trains privately, beside what it learned: constants that follow from its plan.

Counts, tokens and losses are sums over rows without noise, and would tell of them. The rows that a client
holds are public: neighbours differ in what one row says, not in their number.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedflame.messages import Adapter, ClientUpdate, RoundPlan
from fedflame.privacy.terms import Terms


def released(
    plan: RoundPlan,
    terms: Terms,
    num_examples: int,
    delta: Adapter,
    rescaler_values: Tensor,
    counted: Sequence[int],
) -> ClientUpdate:
    """Return the update of a private round.

    Args:
        plan: of the round.
        terms: of the client.
        num_examples: the rows that the client holds.
        delta: what it learned.
        rescaler_values: [L] after training.
        counted: the shape [L,E] of the counts. All experts count the same, so that none is left out of the
            message; where the tokens x k of a layer cannot be shared out evenly, the first count one more.
    """
    layers, experts = counted
    tokens = max(plan.max_steps * plan.batch_size, experts)  # one for each expected row
    share, more = divmod(tokens * plan.active_experts, experts)
    of_a_layer = [share + (expert < more) for expert in range(experts)]
    return ClientUpdate(
        round=plan.round,
        client=plan.client,
        active_experts=plan.active_experts,
        delta=delta,
        rescaler_values=rescaler_values,
        counts=torch.tensor([of_a_layer] * layers),
        tokens=tokens,
        num_examples=num_examples,
        trained_examples=min(num_examples, plan.max_steps * plan.batch_size),
        steps=plan.max_steps,
        loss=None,
        trainable=plan.trainable,
        sampling_rate=terms.sampling_rate,
        noise_multiplier=terms.noise_multiplier,
    )
