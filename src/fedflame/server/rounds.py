"""The federated loop: sample, train, validate, aggregate, evaluate, checkpoint."""

from __future__ import annotations

import errno
import math
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial

from torch.linalg import LinAlgError  # type: ignore[attr-defined] # not in its __all__

from fedflame.clients.answers import Answer
from fedflame.config.run_config import RunConfig
from fedflame.cost.run_cost import local_steps, within_budget
from fedflame.errors import InvalidMessage, UserError
from fedflame.messages import ClientUpdate, RoundPlan
from fedflame.run_files.spans import in_spans
from fedflame.server.checkpoint import Checkpoint, write_checkpoint
from fedflame.server.client_scoring import score_at_clients
from fedflame.server.clipping import OUTLIER, Taken, clipped, outliers, remembered, taken
from fedflame.server.course import Course
from fedflame.server.finite import Diverged, require_finite_state
from fedflame.server.parts import Server
from fedflame.server.private_rounds import expected_tokens, log_spent, private_plan
from fedflame.server.sampling import training_clients
from fedflame.server.scoring import evaluate_tiers, require_finite_losses
from fedflame.server.validation import validate_update
from fedflame.strategies.base import ClientProfile, ServerState
from fedflame.training.reach import require_within_reach, trained_reach
from fedflame.training.schedule import learning_rates, remaining
from fedflame.training.scores import Scores
from fedflame.wire.codec import decode_update, encode_plan

_SPANS = 100
"""Of a round's steps in metrics.jsonl, so that a line stays short however many steps there are."""
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
            state, scores = _round(server, round_number, _Updates(server, checkpoint.state, round_number))
        except Diverged as error:
            state, scores = _round_again(server, checkpoint, round_number, error)
        course.add(server, round_number, scores)
        checkpoint = _keep(server, round_number, state, course)
    return checkpoint


_Round = tuple[ServerState, dict[int, Scores]]
"""The state after a round, and its scores by k; none where it is not evaluated."""


def _round(server: Server, round_number: int, updates: _Updates) -> _Round:
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
        UserError: no client alone is to blame.
    """
    server.metrics.cut(checkpoint.metrics_bytes)
    server.metrics.log("undone", round=round_number, reason=str(error))
    server.reporter.message(f"round {round_number} is undone: {error}; each client's update is tried alone")
    try:
        return _round(server, round_number, _Updates(server, checkpoint.state, round_number, alone=True))
    except Diverged as again:
        raise UserError(
            f"round {round_number}: {again}, and no client alone is to blame. The checkpoint of the round "
            f"before is kept; {_SMALLER}"
        ) from again


@dataclass(frozen=True)
class _Asked:
    """A plan that was sent and not yet answered."""

    profile: ClientProfile
    plan: RoundPlan
    plan_bytes: int


class _Updates:
    """Iterates over a round's valid updates in client order, clipped, and remembers those that were used."""

    def __init__(self, server: Server, state: ServerState, round_number: int, alone: bool = False) -> None:
        """With `alone`, an update is left out that makes a state not finite without any other."""
        self._server, self._state, self._round, self.alone = server, state, round_number, alone
        self._reach = state.past.reach
        self._used: list[Taken] = []  # without the deltas

    @property
    def usable(self) -> int:
        """Return the number of updates that were used so far."""
        return len(self._used)

    def aggregated(self) -> ServerState:
        """Return the state after the round."""
        state = _aggregate(self._server, self._state, self)
        past = remembered(self._state.past, [one.pace for one in self._used])
        return replace(state, past=replace(past, reach=self._reach))

    def warn_of_outliers(self) -> None:
        """Log and report the updates that went much further than the others."""
        for at, times in outliers([one.pace for one in self._used]).items():
            client = self._used[at].update.client
            name = self._server.clients.name(client)
            self._server.metrics.log("outlier", round=self._round, client=client, times=times, limit=OUTLIER)
            self._server.reporter.message(
                f"warning: round {self._round}: {name} went {times:.1f} times as far as the median client"
            )

    def __iter__(self) -> Iterator[ClientUpdate]:
        server = self._server
        rule = server.config.strategy.clip
        for one in clipped(self._accepted(), self._state.past, rule, server.run):
            if self.alone and (found := _not_finite_alone(server, self._state, one.update)):
                self._exclude(one.update.client, one.update.active_experts, f"by its update alone {found}")
                continue
            self._used.append(one.without_delta())
            if one.share < 1:
                self._log_clipped(one)
            yield server.clients.believed(one.update)

    def _accepted(self) -> Iterator[Taken]:
        asked: deque[_Asked] = deque()
        for answer in self._server.clients.train(self._plans(asked), self._server.reporter.step):
            one = self._accept(asked.popleft(), answer)
            if one is not None:
                yield one

    def _plans(self, asked: deque[_Asked]) -> Iterator[tuple[int, bytes]]:
        """Yield clients with their encoded plans, each made when it is needed, and add them to `asked`."""
        server = self._server
        for profile in training_clients(server.config, server.profiles, self._round):
            plan = _round_plan(server, self._state, profile, self._round)
            buffer = encode_plan(plan)
            asked.append(_Asked(profile, plan, len(buffer)))
            if plan.error_feedback:
                self._reach = max(self._reach, trained_reach(plan))
            name = server.clients.name(profile.client)
            server.reporter.start_client(self._round, name, plan.active_experts)
            yield profile.client, buffer

    def _accept(self, asked: _Asked, answer: Answer) -> Taken | None:
        """Return the update in the answer, or None if it cannot be used; the reason is then logged."""
        server, profile, plan = self._server, asked.profile, asked.plan
        server.reporter.end_client(server.clients.name(profile.client))
        try:
            if answer.failure:
                raise InvalidMessage(answer.failure)
            update = decode_update(answer.update, plan)
            validate_update(update, plan, server.max_length)
            _validate_rows(update, profile)
            require_within_reach(update, plan, self._state.past.reach, server.adapted.num_experts_per_tok)
        except InvalidMessage as error:
            self._exclude(profile.client, plan.active_experts, str(error))
            return None
        bytes_down = asked.plan_bytes if answer.bytes_down is None else answer.bytes_down
        one = taken(update, plan)
        self._log(one, plan, bytes_down, answer)
        if plan.is_private:
            log_spent(server, plan, update)
        return one

    def _exclude(self, client: int, k: int, reason: str) -> None:
        server = self._server
        server.metrics.log("excluded", round=self._round, client=client, active_experts=k, reason=reason)
        server.reporter.message(f"round {self._round}: {server.clients.name(client)} is left out: {reason}")

    def _log(self, one: Taken, plan: RoundPlan, bytes_down: int, answer: Answer) -> None:
        update, seconds = one.update, answer.seconds
        rates = list(learning_rates(plan, update.steps))
        server, k, rank = self._server, update.active_experts, update.delta.rank
        tokens = expected_tokens(server, plan) if plan.is_private else update.tokens
        server.metrics.log(
            "client",
            round=update.round,
            client=update.client,
            active_experts=k,
            rank=rank,
            loss=update.loss,
            learning_rate=sum(rates) / max(1, len(rates)),
            step_losses=in_spans(answer.step_losses, _SPANS),
            step_rates=in_spans(rates, _SPANS) if answer.step_losses else [],
            tokens=tokens,
            steps=update.steps,
            num_examples=update.num_examples,
            trained_examples=update.trained_examples,
            seconds=round(seconds, 3),
            training_flops=tokens * server.training_flops(k, rank),
            bytes_up=len(answer.update),
            bytes_down=bytes_down,
            rescaler=update.rescaler_values.tolist(),
            counts=[] if update.loss is None else update.counts.tolist(),
            norms=dict(one.norms),
            pace=one.pace.delta,
        )
        loss = "withheld" if update.loss is None else f"{update.loss:.3f}"
        server.reporter.message(
            f"round {update.round}: {server.clients.name(update.client)} (k={k}) loss {loss}, "
            f"{'about ' * plan.is_private}{tokens:,} tokens, {tokens / seconds:,.0f} tokens/s"
        )

    def _log_clipped(self, one: Taken) -> None:
        client = one.update.client
        self._server.metrics.log("clipped", round=self._round, client=client, share=one.share)
        self._server.reporter.message(
            f"round {self._round}: {self._server.clients.name(client)} went too far: {one.share:.0%} of its "
            "update is used"
        )


def _aggregate(server: Server, state: ServerState, updates: Iterable[ClientUpdate]) -> ServerState:
    try:
        return server.strategy.aggregate_train(state, iter(updates))
    except LinAlgError as error:  # a decomposition met a value that is not finite
        raise Diverged(f"the updates cannot be aggregated ({error})") from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(f"the disk cannot hold the updates of a round: {error.strerror}") from error


def _not_finite_alone(server: Server, state: ServerState, update: ClientUpdate) -> str:
    """Return what is not finite after a round with this update alone; empty if everything is."""
    try:
        alone = _aggregate(server, state, [update])
        require_finite_state(alone)
        require_finite_losses(server, alone, server.held_out)
    except Diverged as error:
        return str(error)
    return ""


def _validate_rows(update: ClientUpdate, profile: ClientProfile) -> None:
    # |D| is a weight in the mean, so a client must not change it once it is known.
    if profile.num_examples and update.num_examples != profile.num_examples:
        raise InvalidMessage(
            f"update claims {update.num_examples} rows; the client has {profile.num_examples}"
        )


def round_learning_rate(config: RunConfig, round_number: int) -> float:
    """Return the learning rate of a round, from 1, before a method changes it; the warm-up is not in it."""
    training, warm = config.training, config.warmup_rounds()
    done, whole = max(0.0, round_number - 1 - warm), config.server.num_server_rounds - warm
    return training.learning_rate * remaining(training.lr_scheduler_type, done, whole)


def _round_plan(server: Server, state: ServerState, profile: ClientProfile, round_number: int) -> RoundPlan:
    in_turn = server.config.trained_experts(server.adapted.num_experts_per_tok, round_number)
    told = replace(profile, active_experts=in_turn[profile.client])
    instructions = server.strategy.configure_train(state, told)
    training, k = server.config.training, instructions.active_experts
    afforded = server.training_flops(profile.active_experts, server.config.adapter.r)
    spent = server.training_flops(k, instructions.adapter.rank)
    tokens = server.config.tokens_per_step()[profile.client]
    rows = server.clients.believed_rows(profile.client)
    batches = rows if tokens else math.ceil(rows / training.per_device_train_batch_size)
    plan = RoundPlan(
        round=round_number,
        client=profile.client,
        seed=server.config.seed,
        active_experts=k,
        rescaler=instructions.rescaler,
        rescaler_values=instructions.rescaler_values,
        adapter=instructions.adapter,
        learning_rate=round_learning_rate(server.config, round_number) * instructions.learning_rate_factor,
        weight_decay=training.weight_decay,
        batch_size=training.per_device_train_batch_size,
        max_steps=local_steps(server.config, batches, afforded, spent),
        tokens_per_step=tokens,
        packed_length=server.max_length if training.packing else 0,
        padding_free=training.padding_free,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        num_train_epochs=within_budget(server.config, training.num_train_epochs, afforded, spent),
        lr_scheduler_type=training.local_lr_scheduler_type,
        warmup_rounds=server.config.warmup_rounds(),
        max_grad_norm=training.max_grad_norm,
        lora_dropout=server.config.adapter.lora_dropout,
        trainable=instructions.trainable,
        merged=state.merged,
        proximal_mu=training.proximal_mu,
        router_aux_loss_coef=training.router_aux_loss_coef,
        rank_penalty=instructions.rank_penalty,
        kept_rank=instructions.kept_rank,
        update_dtype=server.config.communication.update_dtype,
        error_feedback=server.config.error_feedback(),
    )
    return plan if server.config.privacy.unit == "none" else private_plan(server, plan)


def _require_quorum(server: Server, round_number: int, updates: _Updates) -> None:
    needed = server.config.server.min_clients
    if updates.usable < needed:
        advice = _SMALLER if updates.alone else "--resume tries this round again"
        raise UserError(
            f"round {round_number}: {updates.usable} usable updates; server.min_clients = {needed} are "
            f"needed. The checkpoint of the round before is kept; {advice}"
        )


def _keep(server: Server, round_number: int, state: ServerState, course: Course) -> Checkpoint:
    checkpoint = Checkpoint(round_number, server.metrics.sync(), state)
    best_after = partial(course.to_keep, server)
    write_checkpoint(server.run, checkpoint, server.config.server.save_total_limit, best_after)
    return checkpoint
