"""Read a run folder as typed records."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fedflame.checked_json import read_checked
from fedflame.config.methods import METHODS
from fedflame.config.sections import SKILLS
from fedflame.errors import UserError
from fedflame.reading import read_object
from fedflame.report.measured import ClientScore, Measured, ScoreExclusion, TierScore
from fedflame.run_files import ADVICE
from fedflame.run_files.checkpoints import last_kept
from fedflame.run_files.lines import FILE_NAME, read_lines
from fedflame.run_files.task_scores import TaskScores, read_task_scores

ScoreName = Literal["exact_match", "rouge_l"]
SCORES: tuple[ScoreName, ...] = ("exact_match", "rouge_l")


@dataclass(frozen=True)
class Evaluation(Measured):
    """Held-out loss and scores of one tier after one round. `category` None means all rows."""

    round: int
    active_experts: int
    category: str | None
    loss: float | None
    """Nats per response token."""
    exact_match: float | None
    """Share of rows, between 0 and 1."""
    rouge_l: float | None
    """Mean F-measure, between 0 and 1."""


@dataclass(frozen=True)
class Deployment(Measured):
    """Held-out loss and scores on a device that has only the first `rank` ranks, after one round."""

    round: int
    active_experts: int
    rank: int
    loss: float | None
    """Nats per response token."""
    exact_match: float | None
    rouge_l: float | None


@dataclass(frozen=True)
class ClientRound:
    """What one client did and sent in one round."""

    round: int
    client: int
    active_experts: int
    loss: float | None
    """Mean over the steps, in nats per response token; None if the client withholds it."""
    tokens: int
    """Non-padding tokens trained on."""
    steps: int
    """Optimizer steps."""
    num_examples: int
    """Rows the client holds."""
    trained_examples: int
    """Rows that it trained on in the round, each counted once."""
    seconds: float
    training_flops: float
    """FLOPs of the whole round, forward and backward."""
    bytes_up: int
    bytes_down: int
    rescaler: list[float]
    """[L] s per MoE layer after training."""
    counts: list[list[int]]
    """[L,E] tokens routed to each expert; empty if the client withholds them."""
    norms: dict[str, float] = field(default_factory=dict)
    """L2 norms of the delta by kind of bank and of attention, and of the rescaler's step."""
    pace: float | None = None
    """How far the update went; see `strategy.clip`."""
    learning_rate: float | None = None
    """Mean over the steps."""
    step_losses: list[float] = field(default_factory=list)
    """Loss in each of at most 100 equal spans of the steps; empty where the client does not tell it."""
    step_rates: list[float] = field(default_factory=list)
    """Learning rate in each of these spans."""


@dataclass(frozen=True)
class Exclusion:
    """A client whose update was left out of a round."""

    round: int
    client: int
    active_experts: int
    reason: str


@dataclass(frozen=True)
class Clipping:
    """An update that was scaled down."""

    round: int
    client: int
    share: float
    """What was left of it."""


@dataclass(frozen=True)
class Outlier:
    """An update that went much further than the others of its round."""

    round: int
    client: int
    times: float
    """Its pace over the median of the round."""
    limit: float
    """The `times` above which an update is an outlier."""


@dataclass(frozen=True)
class RoundEnd:
    """A finished round."""

    round: int
    clients: int
    """Number of clients whose updates were used."""
    seconds: float


Event = (
    Evaluation
    | Deployment
    | ClientScore
    | TierScore
    | ScoreExclusion
    | ClientRound
    | Exclusion
    | Clipping
    | Outlier
    | RoundEnd
)
_EVENTS: dict[str, tuple[type[Event], tuple[str, ...]]] = {
    "evaluation": (Evaluation, ("round", "active_experts", "category")),
    "deployment": (Deployment, ("round", "active_experts", "rank")),
    "client_evaluation": (ClientScore, ("round", "client")),
    "federated_evaluation": (TierScore, ("round", "active_experts", "rank")),
    "evaluation_excluded": (ScoreExclusion, ("round", "client")),
    "client": (ClientRound, ("round", "client")),
    "excluded": (Exclusion, ("round", "client")),
    "clipped": (Clipping, ("round", "client")),
    "outlier": (Outlier, ("round", "client")),
    "round": (RoundEnd, ("round",)),
}


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
        taken = sorted(at for at, value in values.items() if value is not None)
        return values.get(0), values[taken[-1]] if taken and taken[-1] > 0 else None

    def before_after(
        self, name: str, tier: int, category: str | None = None
    ) -> tuple[float | None, float | None]:
        """Return a measure before training and its last value; None if it was not taken."""
        history = self.history(name, tier, category)
        before = next((value for at, value in history if at == 0), None)
        after = history[-1][1] if history and history[-1][0] > 0 else None
        return before, after


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
    return Run(folder, config, environment, partition, plan, events, tasks)


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
            parsed = _parse_event(line)
        except (KeyError, TypeError) as error:
            place = f"{folder / FILE_NAME}, line {number}"
            raise UserError(f"{place}: not an event of a run: {error!r}; {ADVICE}") from error
        if parsed is not None:
            latest[parsed[0]] = parsed[1]
    return list(latest.values())


def _parse_event(line: dict[str, Any]) -> tuple[tuple[object, ...], Event] | None:
    kind = line["event"]
    # Later versions may add kinds of events; they are ignored.
    if kind not in _EVENTS:
        return None
    record, identity = _EVENTS[kind]
    event = record(**{name: line[name] for name in _fields_in(record, line)})
    return (kind, *(line[name] for name in identity)), event


def _fields_in(record: type[Event], line: dict[str, Any]) -> list[str]:
    """Return the fields to read: those without a default, and of the others those that are there."""
    has_default = {
        one.name
        for one in dataclasses.fields(record)
        if (one.default, one.default_factory) != (dataclasses.MISSING, dataclasses.MISSING)
    }
    return [one.name for one in dataclasses.fields(record) if one.name in line or one.name not in has_default]
