"""What the rounds of a private run ask of each client, and what they have spent; see `privacy`."""

from __future__ import annotations

from dataclasses import replace

from fedflame.messages import RoundPlan
from fedflame.privacy.accounting import Spending, epsilon_of
from fedflame.server.parts import Server
from fedflame.server.sampling import rounds_of


def private_plan(server: Server, plan: RoundPlan) -> RoundPlan:
    """Return a plan of a private run with what says how its client trains privately.

    Every round of a client has as many steps; epochs are steps already, since what is sampled has none.
    """
    privacy = server.config.privacy
    rounds = _rounds_until(server, plan.client, server.config.server.num_server_rounds)
    return replace(
        plan,
        num_train_epochs=0.0,
        clip_norm=privacy.clip_norm,
        clipping=privacy.clipping,
        noise_multiplier=privacy.noise_multiplier,
        target_epsilon=privacy.epsilon,
        target_delta=privacy.delta,
        private_steps=rounds * plan.max_steps,
    )


def expected_tokens(server: Server, plan: RoundPlan) -> int:
    """Return the tokens of a private round that are to be expected: what it trained on is not told."""
    return plan.max_steps * plan.batch_size * server.row_length


def log_spent(server: Server, plan: RoundPlan, sampling_rate: float, noise_multiplier: float) -> None:
    """Log what the client of this plan has spent after this round, by what it says of its noise.

    A round in which it was asked counts, also where its answer was not used.
    """
    steps = _rounds_until(server, plan.client, plan.round) * plan.max_steps
    spent = Spending(sampling_rate, noise_multiplier, steps)
    server.metrics.log(
        "privacy",
        round=plan.round,
        client=plan.client,
        epsilon=epsilon_of([spent], plan.target_delta),
        delta=plan.target_delta,
        noise_multiplier=spent.noise_multiplier,
        sampling_rate=spent.sampling_rate,
        clip_norm=plan.clip_norm,
        steps=spent.steps,
    )


def _rounds_until(server: Server, client: int, last_round: int) -> int:
    clients = [profile.client for profile in server.profiles]
    return rounds_of(server.config, clients, client, last_round)
