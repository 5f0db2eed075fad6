"""What happened in a run, as typed records of the lines of metrics.jsonl."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from fedflame.report.measured import ClientScore, Measured, ScoreExclusion, TierScore

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
class Spent:
    """What a client's private rounds tell of a row at most, after one of them."""

    round: int
    client: int
    epsilon: float
    delta: float
    noise_multiplier: float
    """The standard deviation of the noise over the clip norm."""
    sampling_rate: float
    """The chance of a row to be in a step."""
    steps: int
    """Of all its rounds until now."""


@dataclass(frozen=True)
class RoundEnd:
    """A finished round."""

    round: int
    clients: int
    """Number of clients whose updates were used."""
    seconds: float


@dataclass(frozen=True)
class Stop:
    """A run that stopped before its last round; it may have gone on since."""

    round: int
    reason: str


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
    | Spent
    | RoundEnd
    | Stop
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
    "privacy": (Spent, ("round", "client")),
    "round": (RoundEnd, ("round",)),
    "stopped": (Stop, ("round",)),
}


def parse_event(line: dict[str, Any]) -> tuple[tuple[object, ...], Event] | None:
    """Return a line of metrics.jsonl as a record, with what tells it from others; None for an unknown kind.

    Raises:
        KeyError, TypeError: it lacks something.
    """
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
