"""Read a run folder as typed records."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from fedflame.checked_json import read_checked
from fedflame.config.methods import METHODS
from fedflame.config.sections import MOST_ROUNDS, SKILLS
from fedflame.config.words import BestMetric
from fedflame.errors import UserError
from fedflame.reading import read_object
from fedflame.report.events import (
    SCORES,
    ClientRound,
    Clipping,
    Deployment,
    Evaluation,
    Event,
    Exclusion,
    Outlier,
    RoundEnd,
    ScoreName,
    Spent,
    Stop,
    parse_event,
)
from fedflame.report.measured import ClientScore, ScoreExclusion, TierScore
from fedflame.run_files import ADVICE
from fedflame.run_files.checkpoints import Kept, last_kept
from fedflame.run_files.lines import FILE_NAME, read_lines
from fedflame.run_files.standing import best_rounds, standings
from fedflame.run_files.task_scores import TaskScores, read_task_scores

_Value = TypeVar("_Value")


@dataclass(frozen=True)
class Run:
    """The content of a run folder."""

    folder: Path
    config: dict[str, Any]
    environment: dict[str, Any]
    partition: dict[str, Any]
    plan: dict[str, Any]
    events: list[Event]
    tasks: TaskScores | None = None
    """Scores in tasks of lm-evaluation-harness, if they were asked for."""
    kept: Kept | None = None
    """The last checkpoint."""

    @property
    def evaluations(self) -> list[Evaluation]:
        """Evaluations in the order in which they were taken."""
        return [event for event in self.events if isinstance(event, Evaluation)]

    @property
    def deployments(self) -> list[Deployment]:
        """Measures on devices with a cut adapter, in the order in which they were taken."""
        return [event for event in self.events if isinstance(event, Deployment)]

    @property
    def client_scores(self) -> list[ClientScore]:
        """What clients told of rows of their own, in the order in which it came."""
        return [event for event in self.events if isinstance(event, ClientScore)]

    @property
    def tier_scores(self) -> list[TierScore]:
        """The sums of what clients told, by round and tier."""
        return [event for event in self.events if isinstance(event, TierScore)]

    @property
    def score_exclusions(self) -> list[ScoreExclusion]:
        """Clients that were asked to score and are in no sum."""
        return [event for event in self.events if isinstance(event, ScoreExclusion)]

    @property
    def updates(self) -> list[ClientRound]:
        """Accepted client updates."""
        return [event for event in self.events if isinstance(event, ClientRound)]

    @property
    def exclusions(self) -> list[Exclusion]:
        """Refused client updates."""
        return [event for event in self.events if isinstance(event, Exclusion)]

    @property
    def clippings(self) -> list[Clipping]:
        """Client updates that were scaled down."""
        return [event for event in self.events if isinstance(event, Clipping)]

    @property
    def spent(self) -> list[Spent]:
        """Return what clients of a private run have spent, round by round."""
        return [event for event in self.events if isinstance(event, Spent)]

    @property
    def epsilon(self) -> float | None:
        """Return the largest epsilon that a client has spent; None if the run is not private."""
        return max((event.epsilon for event in self.spent), default=None)

    @property
    def outliers(self) -> list[Outlier]:
        """Client updates that went much further than the others."""
        return [event for event in self.events if isinstance(event, Outlier)]

    @property
    def rounds(self) -> list[RoundEnd]:
        """Finished rounds."""
        return [event for event in self.events if isinstance(event, RoundEnd)]

    def training(self, tier: int) -> dict[int, list[ClientRound]]:
        """Return round -> the updates that were trained with so many experts per token."""
        found: dict[int, list[ClientRound]] = {}
        for update in self.updates:
            if update.active_experts == tier:
                found.setdefault(update.round, []).append(update)
        return dict(sorted(found.items()))

    @property
    def stop(self) -> Stop | None:
        """Where and why the run has stopped before its last round; None if it has not, or has gone on."""
        last = max((end.round for end in self.rounds), default=0)
        stops = [event for event in self.events if isinstance(event, Stop) and event.round == last]
        return stops[0] if stops else None

    @property
    def metric(self) -> BestMetric:
        """What says which round is best."""
        metric: BestMetric = self.setting("server", "metric_for_best_model") or "loss"
        return metric

    @cached_property
    def best_rounds(self) -> dict[int, int]:
        """K -> its best round, of those with a checkpoint since; without a k whose metric was not taken."""
        whole = [e for e in self.evaluations if e.category is None]
        found = standings([(e.round, e.active_experts, e.value(self.metric)) for e in whole], self.metric)
        return best_rounds(found, self.kept.round if self.kept else MOST_ROUNDS)

    @property
    def used_rounds(self) -> dict[int, int]:
        """K -> the round whose adapter is used, where that is the best one; empty where it is the last."""
        return self.best_rounds if self.setting("server", "load_best_model_at_end") else {}

    def setting(self, section: str, key: str) -> Any:
        """Return a value of the resolved configuration; None if it is absent."""
        return self.config.get(section, {}).get(key)

    def name(self, client: int) -> str:
        """Return what a client is called: by the data, by its site, or by its number."""
        entries = self.partition.get("clients", [])
        entry: dict[str, Any] = next((one for one in entries if one["client"] == client), {})
        return str(entry.get("name") or entry.get("site") or f"Client {client}")

    def clients(self) -> dict[int, int]:
        """Return client -> k: its budget under FLAME, or the k that it trained with under other methods."""
        budgets = {c["client"]: c["active_experts"] for c in self.partition.get("clients", [])}
        trained = {event.client: event.active_experts for event in self.exclusions}
        trained |= {event.client: event.active_experts for event in self.updates}
        method = METHODS.get(str(self.setting("strategy", "name")))
        by_budget = method is not None and method.experts in ("in_turn", "afforded")
        return dict(sorted(((trained | budgets) if by_budget else (budgets | trained)).items()))

    def tiers(self) -> list[int]:
        """Return every k that was trained or evaluated, largest first."""
        evaluated = {evaluation.active_experts for evaluation in self.evaluations}
        return sorted(evaluated | set(self.clients().values()), reverse=True)

    def forward_flops(self) -> dict[int, float]:
        """Return k -> forward FLOPs per token, at the largest rank planned for that k."""
        tiers: list[dict[str, Any]] = self.plan.get("tiers", [])
        rising = sorted(tiers, key=lambda tier: int(tier.get("rank", 0)))
        return {tier["active_experts"]: tier["forward_flops_per_token"] for tier in rising}

    def forward_flops_at(self, k: int, rank: int) -> float | None:
        """Return forward FLOPs per token at this k and rank, or at the largest rank if it is not planned."""
        tiers: list[dict[str, Any]] = self.plan.get("tiers", [])
        flops = {
            (tier["active_experts"], tier.get("rank")): tier["forward_flops_per_token"] for tier in tiers
        }
        return flops.get((k, rank), self.forward_flops().get(k))

    def score_name(self) -> ScoreName | None:
        """Return the run's score: exact match for skills, ROUGE-L for free text; None if there is none."""
        preferred = SCORES if self.setting("data", "dataset_name") == SKILLS else SCORES[::-1]
        taken = (n for n in preferred if any(e.value(n) is not None for e in self.evaluations))
        return next(taken, None)

    def history(self, name: str, tier: int, category: str | None = None) -> list[tuple[int, float]]:
        """Return (round, value) pairs of one measure in round order."""
        points = [
            (evaluation.round, value)
            for evaluation in self.evaluations
            if (evaluation.active_experts, evaluation.category) == (tier, category)
            and (value := evaluation.value(name)) is not None
        ]
        return sorted(points)

    def deployed(self, name: str, k: int, rank: int) -> tuple[float | None, float | None]:
        """Return a measure at this k and rank before training and at the end; None if it was not taken."""
        values = {d.round: d.value(name) for d in self.deployments if (d.active_experts, d.rank) == (k, rank)}
        return self.start_and_end(k, sorted((at, value) for at, value in values.items() if value is not None))

    def before_after(
        self, name: str, tier: int, category: str | None = None
    ) -> tuple[float | None, float | None]:
        """Return a measure before training and at the end (see `at_the_end`); None if it was not taken."""
        return self.start_and_end(tier, self.history(name, tier, category))

    def start_and_end(
        self, k: int, history: Sequence[tuple[int, float]]
    ) -> tuple[float | None, float | None]:
        """Return the value of a history before training and at the end; None where it has none."""
        before = next((value for at, value in history if at == 0), None)
        trained = bool(history) and history[-1][0] > 0
        return before, self.at_the_end(k, history) if trained else None

    def at_the_end(self, k: int, history: Sequence[tuple[int, _Value]]) -> _Value | None:
        """Return the last value of a history, or that of the best round of k where that is used."""
        if k in self.used_rounds:
            return dict(history).get(self.used_rounds[k])
        return history[-1][1] if history else None


def read_run(folder: Path) -> Run:
    """Read a run folder. Raises UserError if it is none, or if a file in it is missing or damaged."""
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise UserError(f"{folder}: {what}; a report needs a run folder, which holds a config.json")
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: not a run folder: config.json is missing")
    config = read_object(folder / "config.json")
    if missing := [name for name in ("strategy", "server") if not isinstance(config.get(name), dict)]:
        raise UserError(f"{folder}: not a run folder: config.json has no section {' and no '.join(missing)}")
    names = ("config.json", "environment.json", "partition.json", "plan.json")
    config, environment, partition, plan = (read_checked(folder / name, ADVICE) for name in names)
    events, tasks = _read_events(folder), read_task_scores(folder)
    return Run(folder, config, environment, partition, plan, events, tasks, last_kept(folder))


def read_metrics(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a run's metrics.jsonl, which is whole as far as the run's last checkpoint knows.

    Raises:
        UserError: it is missing or damaged.
    """
    last = last_kept(folder)
    return read_lines(folder / FILE_NAME, last.metrics_bytes if last else 0)


def _read_events(folder: Path) -> list[Event]:
    # If two events have the same key, the later one counts.
    latest: dict[tuple[object, ...], Event] = {}
    for number, line in enumerate(read_metrics(folder), start=1):
        try:
            parsed = parse_event(line)
        except (KeyError, TypeError) as error:
            place = f"{folder / FILE_NAME}, line {number}"
            raise UserError(f"{place}: not an event of a run: {error!r}; {ADVICE}") from error
        if parsed is not None:
            latest[parsed[0]] = parsed[1]
    return list(latest.values())
