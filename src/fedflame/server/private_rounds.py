"""What the rounds of a private run ask of each client, and what they have spent; see `privacy`."""

from __future__ import annotations

from typing import TypedDict

from fedflame.messages import RoundPlan
from fedflame.privacy.accounting import epsilon_of
from fedflame.privacy.terms import terms_of
from fedflame.server.parts import Server
from fedflame.server.sampling import training_clients


class PrivatePlan(TypedDict):
    """The fields of a plan that say how a client trains privately."""

    clip_norm: float
    noise_multiplier: float
    epsilon: float
    delta: float
    private_steps: int


def private_plan(server: Server, client: int, steps: int) -> PrivatePlan:
    """Return them for a client that takes so many steps in each of its rounds."""
    privacy = server.config.privacy
    rounds = _rounds_until(server, client, server.config.server.num_server_rounds)
    return PrivatePlan(
        clip_norm=privacy.clip_norm,
        noise_multiplier=privacy.noise_multiplier,
        epsilon=privacy.epsilon,
        delta=privacy.delta,
        private_steps=rounds * steps,
    )


def log_spent(server: Server, plan: RoundPlan, rows: int) -> None:
    """Log what a client with so many rows has spent after this round.

    A round in which it was asked counts, also where its answer was not used.
    """
    terms = terms_of(plan, rows)
    spent = terms.spending(_rounds_until(server, plan.client, plan.round) * plan.max_steps)
    server.metrics.log(
        "privacy",
        round=plan.round,
        client=plan.client,
        epsilon=epsilon_of([spent], plan.delta),
        delta=plan.delta,
        noise_multiplier=terms.noise_multiplier,
        sampling_rate=terms.sampling_rate,
        clip_norm=plan.clip_norm,
        steps=spent.steps,
    )


def _rounds_until(server: Server, client: int, last_round: int) -> int:
    """Return the number of rounds up to this one that ask a client to train."""
    if server.config.clients_per_round() >= len(server.profiles):
        return last_round
    rounds = range(1, last_round + 1)
    asked = (training_clients(server.config, server.profiles, number) for number in rounds)
    return sum(client in [profile.client for profile in clients] for clients in asked)
