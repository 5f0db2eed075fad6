"""The global model on rows of the clients: they score it where the rows are, and send sums alone."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fedflame.clients.answers import Answer
from fedflame.errors import InvalidMessage
from fedflame.messages import ClientEvaluation, EvaluationPlan
from fedflame.server.parts import Server
from fedflame.server.sampling import sample_clients
from fedflame.server.scoring import scores_in_words
from fedflame.server.validation import validate_evaluation
from fedflame.strategies.base import ServerState
from fedflame.training.scores import Scores
from fedflame.wire.codec import decode_evaluation, encode_plan


@dataclass(frozen=True)
class _Asked:
    """A plan that was sent and not yet answered."""

    plan: EvaluationPlan
    rank: int
    """The LoRA rank that the client deploys."""
    plan_bytes: int


def score_at_clients(server: Server, state: ServerState, round_number: int) -> None:
    """Ask a sample of the clients to score the model as they deploy it; log their sums, and those by tier.

    A client that cannot score, or whose answer cannot be right, is left out with the reason.
    """
    if not server.config.evaluating_clients():
        return
    asked: deque[_Asked] = deque()
    by_tier: dict[tuple[int, int], list[Scores]] = {}
    for answer in server.clients.evaluate(_plans(server, state, round_number, asked)):
        one = asked.popleft()
        scores = _accept(server, one, answer)
        if scores is not None:
            by_tier.setdefault((one.plan.active_experts, one.rank), []).append(scores)
    for tier in sorted(by_tier, reverse=True):
        _log_tier(server, round_number, tier, by_tier[tier])
    if by_tier:
        everyone = [scores for of_tier in by_tier.values() for scores in of_tier]
        _log_tier(server, round_number, None, everyone)


def _plans(
    server: Server, state: ServerState, round_number: int, asked: deque[_Asked]
) -> Iterator[tuple[int, bytes]]:
    """Yield clients with their encoded plans, each made when it is needed, and add them to `asked`."""
    config, rows = server.config, server.clients.test_rows()
    able = [profile for profile in server.scorers if rows[profile.client] != 0]
    count = min(config.evaluating_clients(), len(able))
    deployed = config.deployed(server.adapted.num_experts_per_tok)
    generate = config.is_due(config.evaluation.generate_every, round_number)
    for profile in sample_clients(able, count, config.seed, round_number, "evaluate"):
        k, rank = deployed[profile.client]
        cut = rank < config.adapter.r
        plan = EvaluationPlan(
            round=round_number,
            client=profile.client,
            active_experts=k,
            rescaler_values=state.rescalers[k],
            adapter=state.adapter.with_rank(rank) if cut else state.adapter_at(k),
            merged=state.merged,
            max_new_tokens=config.evaluation.max_new_tokens if generate else 0,
        )
        buffer = encode_plan(plan)
        asked.append(_Asked(plan, rank, len(buffer)))
        yield profile.client, buffer


def _accept(server: Server, asked: _Asked, answer: Answer) -> Scores | None:
    """Return the sums in the answer, or None if they cannot be used; the reason is then logged."""
    plan, rows = asked.plan, server.clients.test_rows()
    try:
        if answer.failure:
            raise InvalidMessage(answer.failure)
        evaluation = decode_evaluation(answer.update)
        validate_evaluation(evaluation, plan, server.max_length, rows[plan.client])
    except InvalidMessage as error:
        server.metrics.log(
            "evaluation_excluded",
            round=plan.round,
            client=plan.client,
            active_experts=plan.active_experts,
            reason=str(error),
        )
        name = server.clients.name(plan.client)
        server.reporter.message(f"round {plan.round}: {name} is left out of the evaluation: {error}")
        return None
    scores = _scores(evaluation)
    server.metrics.log(
        "client_evaluation",
        round=plan.round,
        client=plan.client,
        active_experts=plan.active_experts,
        rank=asked.rank,
        loss_sum=scores.loss_sum,
        exact_matches=scores.exact_matches,
        rouge_l_sum=scores.rouge_l_sum,
        **scores.to_json(),
        seconds=round(answer.seconds, 3),
        bytes_up=len(answer.update),
        bytes_down=asked.plan_bytes if answer.bytes_down is None else answer.bytes_down,
    )
    return scores


def _scores(evaluation: ClientEvaluation) -> Scores:
    return Scores(
        evaluation.rows,
        evaluation.loss_sum,
        evaluation.response_tokens,
        evaluation.exact_matches,
        evaluation.rouge_l_sum,
    )


def _log_tier(
    server: Server, round_number: int, tier: tuple[int, int] | None, scores: Sequence[Scores]
) -> None:
    """Log the sum of these clients; a tier is k and rank, None stands for all clients together."""
    first, *rest = scores
    together = sum(rest, first)
    k, rank = tier or (None, None)
    server.metrics.log(
        "federated_evaluation",
        round=round_number,
        active_experts=k,
        rank=rank,
        clients=len(scores),
        **together.to_json(),
    )
    cut = f", {rank} ranks" if rank is not None and rank < server.config.adapter.r else ""
    where = "all clients" if tier is None else f"clients at k={k}{cut}"
    server.reporter.message(
        f"round {round_number}: rows of {where}: {scores_in_words(together)} "
        f"({len(scores)} client{'s' * (len(scores) > 1)}, {together.rows:,} rows)"
    )
