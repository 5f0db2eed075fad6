"""The course of a run: which rounds were best, which are kept for it, and whether it stops."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fedflame.run_files.standing import Standing, best_rounds
from fedflame.server.parts import Server
from fedflame.training.scores import Scores


class Course:
    """What the evaluations so far say. It follows from metrics.jsonl, so that a resumed run has the same."""

    def __init__(self, standings: Sequence[Standing] = (), stopped: bool = False) -> None:
        """Begin anew, or go on after these standings; `stopped` says that the run has stopped at the last."""
        self._standings, self._stopped = [*standings], stopped

    def add(self, server: Server, round_number: int, scores: Mapping[int, Scores]) -> None:
        """Add the scores of a round by k; log and report what is best, and whether the run stops."""
        config, metric = server.config.server, server.config.server.metric_for_best_model
        values = {k: value for k, of_k in scores.items() if (value := getattr(of_k, metric)) is not None}
        if not values:
            return
        before = self._standings[-1] if self._standings else Standing()
        now = before.after(round_number, values, metric, config.early_stopping_threshold)
        self._standings.append(now)
        for k, best in now.of_tier.items() if config.looks_for_best else ():
            if best.round == round_number:
                event = {"round": round_number, "active_experts": k, "metric": metric, "value": best.value}
                server.metrics.log("best", **event)
        self._stopped = self._waited_enough(server) and round_number < config.num_server_rounds
        if self._stopped:
            reason = self._reason(server)
            server.metrics.log("stopped", round=round_number, reason=reason)
            server.reporter.message(f"round {round_number}: the run stops: {reason}")

    def has_stopped(self, server: Server) -> bool:
        """Return whether the run has stopped; with a longer patience it goes on."""
        return self._stopped and self._waited_enough(server)

    def to_keep(self, server: Server, round_number: int) -> set[int]:
        """Return the rounds that were best after this one, if each k is to have its best at the end."""
        if not server.config.server.load_best_model_at_end:
            return set()
        return {*best_rounds(self._standings, round_number).values()}

    def _waited_enough(self, server: Server) -> bool:
        patience = server.config.server.early_stopping_patience
        return 0 < patience <= self._standings[-1].waited

    def _reason(self, server: Server) -> str:
        last = self._standings[-1]
        best = f"; the best was round {last.mean.round}" if last.mean else ""
        evaluations = "evaluation" if last.waited == 1 else f"{last.waited} evaluations"
        metric = server.config.server.metric_for_best_model
        return f"the mean {metric} over all k did not improve in the last {evaluations}{best}"
