"""The federated loop: sample, train, validate, aggregate, evaluate, checkpoint."""

from __future__ import annotations

import time
from functools import partial

from fedflame.errors import UserError
from fedflame.server.checkpoint import Checkpoint, write_checkpoint
from fedflame.server.client_scoring import score_at_clients
from fedflame.server.course import Course
from fedflame.server.finite import Diverged, require_finite_state
from fedflame.server.masked_updates import MaskedUpdates
from fedflame.server.parts import Server
from fedflame.server.scoring import evaluate_tiers, require_finite_losses
from fedflame.server.updates import Updates
from fedflame.strategies.base import ServerState
from fedflame.training.scores import Scores

_SMALLER = "a new run may need a smaller training.learning_rate"


def run_rounds(server: Server, checkpoint: Checkpoint, course: Course) -> Checkpoint:
    """Run the rounds from `checkpoint` to the last one, or until the run stops; keep a checkpoint after each.

    Raises:
        UserError: a round has fewer than `server.min_clients` usable updates, or the disk is full.
            `OutOfMemory` is one, too. The last checkpoint stays, and the run can be resumed from it.
    """
    if checkpoint.metrics_bytes == 0:
        course.add(server, 0, evaluate_tiers(server, checkpoint.state, 0))
        score_at_clients(server, checkpoint.state, 0)
        checkpoint = _keep(server, 0, checkpoint.state, course)
    for round_number in range(checkpoint.round + 1, server.config.server.num_server_rounds + 1):
        if course.has_stopped(server):
            break
        try:
            sums = server.config.privacy.secure_aggregation
            updates = (MaskedUpdates if sums else Updates)(server, checkpoint.state, round_number)
            state, scores = _round(server, round_number, updates)
        except Diverged as error:
            state, scores = _round_again(server, checkpoint, round_number, error)
        course.add(server, round_number, scores)
        checkpoint = _keep(server, round_number, state, course)
    return checkpoint


_Round = tuple[ServerState, dict[int, Scores]]
"""The state after a round, and its scores by k; none where it is not evaluated."""


def _round(server: Server, round_number: int, updates: Updates) -> _Round:
    """Aggregate the updates, check what comes of it, and evaluate it.

    Raises:
        Diverged: the new state, or a held-out loss that it gives, is not finite.
    """
    start = time.monotonic()
    state = updates.aggregated()
    _require_quorum(server, round_number, updates)
    require_finite_state(state)
    updates.warn_of_outliers()
    server.metrics.log(
        "round", round=round_number, clients=updates.usable, seconds=round(time.monotonic() - start, 3)
    )
    if server.config.is_due(server.config.evaluation.evaluate_every, round_number):
        scores = evaluate_tiers(server, state, round_number)
        score_at_clients(server, state, round_number)
        return state, scores
    require_finite_losses(server, state, server.held_out.first_rows(1))
    return state, {}


def _round_again(server: Server, checkpoint: Checkpoint, round_number: int, error: Diverged) -> _Round:
    """Ask for the round's updates again, and use those that alone leave everything finite.

    A client trains the same again, or sends its last answer, so that no update has to be kept.

    Raises:
        UserError: no client alone is to blame, or updates are seen in sums alone.
    """
    if server.config.privacy.secure_aggregation:
        raise UserError(
            f"round {round_number}: {error}, and a masked sum does not say by whom. The checkpoint of the "
            f"round before is kept; {_SMALLER}"
        ) from error
    server.metrics.cut(checkpoint.metrics_bytes)
    server.metrics.log("undone", round=round_number, reason=str(error))
    server.reporter.message(f"round {round_number} is undone: {error}; each client's update is tried alone")
    try:
        return _round(server, round_number, Updates(server, checkpoint.state, round_number, alone=True))
    except Diverged as again:
        raise UserError(
            f"round {round_number}: {again}, and no client alone is to blame. The checkpoint of the round "
            f"before is kept; {_SMALLER}"
        ) from again


def _require_quorum(server: Server, round_number: int, updates: Updates) -> None:
    needed = server.config.server.min_clients
    if updates.arrived < needed:
        advice = _SMALLER if updates.alone else "--resume tries this round again"
        raise UserError(
            f"round {round_number}: {updates.arrived} usable updates; server.min_clients = {needed} are "
            f"needed. The checkpoint of the round before is kept; {advice}"
        )


def _keep(server: Server, round_number: int, state: ServerState, course: Course) -> Checkpoint:
    checkpoint = Checkpoint(round_number, server.metrics.sync(), state)
    best_after = partial(course.to_keep, server)
    write_checkpoint(server.run, checkpoint, server.config.server.save_total_limit, best_after)
    return checkpoint
