"""A run folder as a program reads it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedflame.config.run_config import RunConfig
from fedflame.errors import UserError
from fedflame.experiment.run_folder import saved_config
from fedflame.experiment.used_model import used_states
from fedflame.report.records import read_metrics, read_run

if TYPE_CHECKING:
    from fedflame.messages import Adapter


@dataclass(frozen=True)
class Run:
    """A run folder. Everything is read from its files when it is asked for."""

    folder: Path

    @property
    def config(self) -> RunConfig:
        """The configuration that the run was started with."""
        return saved_config(self.folder)

    @property
    def report(self) -> Path:
        """The HTML report."""
        return self.folder / "report.html"

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """Every line of metrics.jsonl as a flat dict, so that `pandas.DataFrame(run.metrics)` is a table.

        `event` says what a line is: `evaluation` (of the global model, by round, k and category), `client`
        (an update), `round`, `excluded` or `deployment`; `client_evaluation` is what a client told of rows of
        its own, and `federated_evaluation` the sum of a tier.

        Raises:
            UserError: the file is missing or damaged.
        """
        return list(read_metrics(self.folder))

    @property
    def scores(self) -> dict[int, dict[int, dict[str, float | None]]]:
        """Of the global model on all held-out rows, by round (0: before training) and k.

        Each has `loss` (nats per response token), `exact_match` and `rouge_l` (from 0 to 1; None in a round
        in which nothing was generated).
        """
        found: dict[int, dict[int, dict[str, float | None]]] = {}
        for evaluation in read_run(self.folder).evaluations:
            if evaluation.category is None:
                of_round = found.setdefault(evaluation.round, {})
                of_round[evaluation.active_experts] = {
                    name: evaluation.value(name) for name in ("loss", "exact_match", "rouge_l")
                }
        return found

    @property
    def client_scores(self) -> dict[int, dict[int, dict[str, float | None]]]:
        """What clients told of the global model on rows of their own, by round and client.

        Each has the measures of `scores`, `active_experts` and `rank` of what the client deploys, and `rows`
        and `response_tokens`. Empty unless `server.fraction_evaluate` asks clients to score.
        """
        found: dict[int, dict[int, dict[str, float | None]]] = {}
        for told in read_run(self.folder).client_scores:
            values = asdict(told)
            found.setdefault(values.pop("round"), {})[values.pop("client")] = values
        return found

    @property
    def federated_scores(self) -> dict[int, dict[tuple[int, int] | None, dict[str, float | None]]]:
        """The sums of what clients told, by round and tier: k and rank; None stands for all clients together.

        Each has the measures of `scores`, and `clients`, `rows` and `response_tokens` in the sum.
        """
        found: dict[int, dict[tuple[int, int] | None, dict[str, float | None]]] = {}
        for told in read_run(self.folder).tier_scores:
            values = asdict(told)
            k, rank = values.pop("active_experts"), values.pop("rank")
            found.setdefault(values.pop("round"), {})[None if k is None else (k, rank)] = values
        return found

    @property
    def adapter_folder(self) -> Path:
        """For `PeftModel.from_pretrained`. If the method keeps an adapter for k = 4, it is in `k4` below."""
        return self.folder / "adapter"

    @property
    def best_rounds(self) -> dict[int, int]:
        """K -> its best round by `server.metric_for_best_model`; 0 where the model before training was."""
        return dict(read_run(self.folder).best_rounds)

    @property
    def used_rounds(self) -> dict[int, int]:
        """K -> the round of `adapter(k)`: the last one, or its best (`server.load_best_model_at_end`)."""
        recorded = read_run(self.folder)
        last = recorded.kept.round if recorded.kept else 0
        return {k: recorded.used_rounds.get(k, last) for k in self.scores[0]}

    def adapter(self, k: int | None = None) -> Adapter:
        """The values of the adapter that is used with k experts per token, in fp32.

        Args:
            k: a tier of the run; None for the largest. A method that keeps one adapter for all has it at
                every k. Factors that the method merged into the base are further ranks of it.

        Raises:
            UserError: the run has no checkpoint, or k is no tier of it.
        """
        state_at = used_states(self.folder)
        tiers = sorted(state_at(0).rescalers, reverse=True)
        wanted = tiers[0] if k is None else k
        if wanted not in tiers:
            raise UserError(f"k = {wanted}: the run has an adapter for k = {', '.join(map(str, tiers))}")
        return state_at(wanted).total_at(wanted)

    def rescaler(self, k: int) -> list[float]:
        """S of each MoE layer, in the order of the layers, that goes with `adapter(k)`.

        Raises:
            UserError: the run has no checkpoint, or k is no tier of it.
        """
        rescalers = used_states(self.folder)(k).rescalers
        if k not in rescalers:
            tiers = ", ".join(map(str, sorted(rescalers, reverse=True)))
            raise UserError(f"k = {k}: the run has a rescaler for k = {tiers}")
        values: list[float] = rescalers[k].tolist()
        return values
