"""The federated loop: sample, train, validate, aggregate, evaluate, checkpoint."""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fedflame.base.out_of_memory import memory_in_words
from fedflame.clients.answers import Answer, Clients
from fedflame.config.run_config import RunConfig
from fedflame.cost.run_cost import local_steps
from fedflame.errors import InvalidMessage, UserError
from fedflame.messages import Adapter, ClientUpdate, RoundPlan, validate_update
from fedflame.moe.adapted_model import AdaptedModel
from fedflame.seeds import derive_seed
from fedflame.server.checkpoint import Checkpoint, write_checkpoint
from fedflame.server.metrics import MetricsFile
from fedflame.server.progress import Reporter
from fedflame.strategies.base import ClientProfile, ServerState, Strategy
from fedflame.training.evaluation import HeldOut, evaluate
from fedflame.training.scores import Scores, total
from fedflame.wire.codec import decode_update, encode_plan


@dataclass(frozen=True)
class Server:
    """The parts of a run that stay the same in all rounds."""

    config: RunConfig
    run: Path
    strategy: Strategy
    profiles: Sequence[ClientProfile]
    """The clients and what they afford, in client order."""
    tiers: Sequence[int]
    """The values of k to evaluate at, largest first."""
    deployments: Sequence[tuple[int, int]]
    """Pairs of k and cut rank to evaluate at as well; see `RunConfig.cut_deployments`."""
    training_flops: Callable[[int, int], float]
    """Returns the training FLOPs per token for k and rank."""
    clients: Clients
    adapted: AdaptedModel
    held_out: HeldOut
    metrics: MetricsFile
    reporter: Reporter


def run_rounds(server: Server, checkpoint: Checkpoint) -> Checkpoint:
    """Run the rounds from `checkpoint` to the last configured one; write a checkpoint after every round.

    Raises:
        UserError: a round has fewer than `server.min_clients` usable updates, or the disk is full.
            `OutOfMemory` is one, too. The last checkpoint stays, and the run can be resumed from it.
    """
    if checkpoint.metrics_bytes == 0:
        _evaluate_tiers(server, checkpoint.state, 0)
        checkpoint = _keep(server, 0, checkpoint.state)
    for round_number in range(checkpoint.round + 1, server.config.server.num_server_rounds + 1):
        start = time.monotonic()
        updates = _Updates(server, checkpoint.state, round_number)
        state = server.strategy.aggregate_train(checkpoint.state, iter(updates))
        _require_quorum(server, round_number, updates.usable)
        server.metrics.log(
            "round", round=round_number, clients=updates.usable, seconds=round(time.monotonic() - start, 3)
        )
        if server.config.is_due(server.config.evaluation.evaluate_every, round_number):
            _evaluate_tiers(server, state, round_number)
        checkpoint = _keep(server, round_number, state)
    return checkpoint


def sample_clients(
    clients: Sequence[ClientProfile], count: int, seed: int, round_number: int
) -> list[ClientProfile]:
    """Draw a seeded sample of `count` clients, in client order. It does not depend on the given order."""
    ordered = sorted(clients, key=lambda profile: profile.client)
    chosen = random.Random(derive_seed(seed, "sample", round_number)).sample(ordered, count)
    return sorted(chosen, key=lambda profile: profile.client)


@dataclass(frozen=True)
class _Asked:
    """A plan that was sent and not yet answered."""

    profile: ClientProfile
    plan: RoundPlan
    plan_bytes: int


class _Updates:
    """Iterates over a round's valid updates in client order, and counts them in `usable`."""

    def __init__(self, server: Server, state: ServerState, round_number: int) -> None:
        self._server, self._state, self._round = server, state, round_number
        self.usable = 0

    def __iter__(self) -> Iterator[ClientUpdate]:
        asked: deque[_Asked] = deque()
        for answer in self._server.clients.train(self._plans(asked), self._server.reporter.step):
            update = self._accept(asked.popleft(), answer)
            if update is not None:
                self.usable += 1
                yield update

    def _plans(self, asked: deque[_Asked]) -> Iterator[tuple[int, bytes]]:
        """Yield clients with their encoded plans, each made when it is needed, and add them to `asked`."""
        server = self._server
        count, seed = server.config.clients_per_round(), server.config.seed
        for profile in sample_clients(server.profiles, count, seed, self._round):
            plan = _round_plan(server, self._state, profile, self._round)
            buffer = encode_plan(plan)
            asked.append(_Asked(profile, plan, len(buffer)))
            name = server.clients.name(profile.client)
            server.reporter.start_client(self._round, name, plan.active_experts)
            yield profile.client, buffer

    def _accept(self, asked: _Asked, answer: Answer) -> ClientUpdate | None:
        """Return the update in the answer, or None if it cannot be used; the reason is then logged."""
        server, profile, plan = self._server, asked.profile, asked.plan
        name = server.clients.name(profile.client)
        server.reporter.end_client(name)
        try:
            if answer.failure:
                raise InvalidMessage(answer.failure)
            update = decode_update(answer.update, plan)
            validate_update(update, plan)
            _validate_rows(update, profile)
        except InvalidMessage as error:
            server.metrics.log(
                "excluded",
                round=self._round,
                client=profile.client,
                active_experts=plan.active_experts,
                reason=str(error),
            )
            server.reporter.message(f"round {self._round}: {name} is left out: {error}")
            return None
        bytes_down = asked.plan_bytes if answer.bytes_down is None else answer.bytes_down
        self._log(update, bytes_down, len(answer.update), answer.seconds)
        return update

    def _log(self, update: ClientUpdate, bytes_down: int, bytes_up: int, seconds: float) -> None:
        server, k, rank = self._server, update.active_experts, update.delta.rank
        server.metrics.log(
            "client",
            round=update.round,
            client=update.client,
            active_experts=k,
            rank=rank,
            loss=update.loss,
            tokens=update.tokens,
            steps=update.steps,
            num_examples=update.num_examples,
            trained_examples=update.trained_examples,
            seconds=round(seconds, 3),
            training_flops=update.tokens * server.training_flops(k, rank),
            bytes_up=bytes_up,
            bytes_down=bytes_down,
            rescaler=update.rescaler_values.tolist(),
            counts=update.counts.tolist(),
        )
        server.reporter.message(
            f"round {update.round}: {server.clients.name(update.client)} (k={k}) loss {update.loss:.3f}, "
            f"{update.tokens:,} tokens, {update.tokens / seconds:,.0f} tokens/s"
        )


def _validate_rows(update: ClientUpdate, profile: ClientProfile) -> None:
    # |D| is a weight in the mean, so a client must not change it once it is known.
    if profile.num_examples and update.num_examples != profile.num_examples:
        raise InvalidMessage(
            f"update claims {update.num_examples} rows; the client has {profile.num_examples}"
        )


def _round_plan(server: Server, state: ServerState, profile: ClientProfile, round_number: int) -> RoundPlan:
    in_turn = server.config.trained_experts(server.adapted.num_experts_per_tok, round_number)
    told = replace(profile, active_experts=in_turn[profile.client])
    instructions = server.strategy.configure_train(state, told)
    training, k = server.config.training, instructions.active_experts
    afforded = server.training_flops(profile.active_experts, server.config.adapter.r)
    spent = server.training_flops(k, instructions.adapter.rank)
    return RoundPlan(
        round=round_number,
        client=profile.client,
        seed=server.config.seed,
        active_experts=k,
        rescaler=instructions.rescaler,
        rescaler_values=instructions.rescaler_values,
        adapter=instructions.adapter,
        learning_rate=server.config.learning_rate(round_number) * instructions.learning_rate_factor,
        weight_decay=training.weight_decay,
        batch_size=training.per_device_train_batch_size,
        max_steps=local_steps(server.config, afforded, spent),
        tokens_per_step=server.config.tokens_per_step()[profile.client],
        trainable=instructions.trainable,
        merged=state.merged,
        proximal_mu=training.proximal_mu,
        rank_penalty=instructions.rank_penalty,
        kept_rank=instructions.kept_rank,
        update_dtype=server.config.communication.update_dtype,
        error_feedback=server.config.error_feedback(),
    )


def _require_quorum(server: Server, round_number: int, usable: int) -> None:
    needed = server.config.server.min_clients
    if usable < needed:
        raise UserError(
            f"round {round_number}: {usable} usable updates; server.min_clients = {needed} are needed. "
            "The checkpoint of the round before is kept; --resume tries this round again"
        )


def _evaluate_tiers(server: Server, state: ServerState, round_number: int) -> None:
    """Evaluate the global model at every tier with its rescaler, and at the cut ranks; log the scores."""
    for k in server.tiers:
        scores = _evaluate(server, state, state.adapter_at(k), k, round_number)
        together = total(scores)
        _log_scores(
            server.metrics, "evaluation", together, round=round_number, active_experts=k, category=None
        )
        for category, category_scores in scores.items():
            _log_scores(
                server.metrics,
                "evaluation",
                category_scores,
                round=round_number,
                active_experts=k,
                category=category,
            )
        server.reporter.message(f"round {round_number}: global model at k={k}: {_in_words(together)}")
    for k, rank in server.deployments:
        together = total(_evaluate(server, state, state.adapter.with_rank(rank), k, round_number))
        _log_scores(server.metrics, "deployment", together, round=round_number, active_experts=k, rank=rank)
        server.reporter.message(
            f"round {round_number}: its first {rank} ranks at k={k}: {_in_words(together)}"
        )


def _evaluate(
    server: Server, state: ServerState, adapter: Adapter, k: int, round_number: int
) -> dict[str, Scores]:
    generate = server.config.is_due(server.config.evaluation.generate_every, round_number)
    adapted, rescaler = server.adapted, state.rescalers[k]
    with memory_in_words(adapted.model.device, f"evaluating at k = {k}", ""):
        return evaluate(adapted, server.held_out, adapter, k, rescaler, generate, state.merged)


def _in_words(scores: Scores) -> str:
    exact = "" if scores.exact_match is None else f", exact match {scores.exact_match:.1%}"
    rouge = "" if scores.rouge_l is None else f", ROUGE-L {scores.rouge_l:.3f}"
    return f"loss {scores.loss:.3f}{exact}{rouge}"


def _log_scores(metrics: MetricsFile, event: str, scores: Scores, **what: int | str | None) -> None:
    metrics.log(event, **what, **scores.to_json())


def _keep(server: Server, round_number: int, state: ServerState) -> Checkpoint:
    checkpoint = Checkpoint(round_number, server.metrics.sync(), state)
    write_checkpoint(server.run, checkpoint, server.config.server.save_total_limit)
    return checkpoint
