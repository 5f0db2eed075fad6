"""The global model on held-out rows: the scores of a round, and whether its losses are finite at all."""

from __future__ import annotations

from fedflame.base.out_of_memory import memory_in_words
from fedflame.messages import Adapter
from fedflame.server.finite import require_finite_loss
from fedflame.server.metrics import MetricsFile
from fedflame.server.parts import Server
from fedflame.strategies.base import ServerState
from fedflame.training.evaluation import HeldOut, evaluate
from fedflame.training.scores import Scores, total


def evaluate_tiers(server: Server, state: ServerState, round_number: int) -> dict[int, Scores]:
    """Evaluate the global model at every tier with its rescaler, and at the cut ranks; log the scores.

    Returns:
        k -> scores on all held-out rows.

    Raises:
        Diverged: a loss is not finite.
    """
    of_tier = {}
    for k in server.tiers:
        scores = _evaluate(server, state, state.adapter_at(k), k, round_number)
        of_tier[k] = together = total(scores)
        require_finite_loss(together.loss, k)
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
        server.reporter.message(f"round {round_number}: global model at k={k}: {scores_in_words(together)}")
    for k, rank in server.deployments:
        together = total(_evaluate(server, state, state.adapter.with_rank(rank), k, round_number))
        require_finite_loss(together.loss, k)
        _log_scores(server.metrics, "deployment", together, round=round_number, active_experts=k, rank=rank)
        server.reporter.message(
            f"round {round_number}: its first {rank} ranks at k={k}: {scores_in_words(together)}"
        )
    return of_tier


def _evaluate(
    server: Server, state: ServerState, adapter: Adapter, k: int, round_number: int
) -> dict[str, Scores]:
    generate = server.config.is_due(server.config.evaluation.generate_every, round_number)
    adapted, rescaler = server.adapted, state.rescalers[k]
    with memory_in_words(adapted.model.device, f"evaluating at k = {k}", ""):
        return evaluate(adapted, server.held_out, adapter, k, rescaler, generate, state.merged)


def require_finite_losses(server: Server, state: ServerState, rows: HeldOut) -> None:
    """Raises `Diverged` where the global model's loss on these rows is not finite."""
    models = [(k, state.adapter_at(k)) for k in server.tiers]
    models += [(k, state.adapter.with_rank(rank)) for k, rank in server.deployments]
    for k, adapter in models:
        scores = evaluate(server.adapted, rows, adapter, k, state.rescalers[k], False, state.merged)
        require_finite_loss(total(scores).loss, k)


def scores_in_words(scores: Scores) -> str:
    """Return the means in words."""
    exact = "" if scores.exact_match is None else f", exact match {scores.exact_match:.1%}"
    rouge = "" if scores.rouge_l is None else f", ROUGE-L {scores.rouge_l:.3f}"
    return f"loss {scores.loss:.3f}{exact}{rouge}"


def _log_scores(metrics: MetricsFile, event: str, scores: Scores, **what: int | str | None) -> None:
    metrics.log(event, **what, **scores.to_json())
