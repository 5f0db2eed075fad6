"""Attack a run: what the hub can tell of canary rows that a client may have trained on.

Canaries are rows of random letters. Each is among the client's rows by the toss of a fair coin. The attacker
is the hub: it sees every update of the client, or of the group in whose sum the client is, and scores a
canary by how far its loss falls with each.
"""

from __future__ import annotations

import random
import string
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fedflame.config.run_config import RunConfig
from fedflame.data.batches import collate
from fedflame.data.conversations import Conversation, single_turn
from fedflame.data.encoder import pad_token
from fedflame.data.encoding import EncodedRow, encode_rows
from fedflame.data.federation import Federation
from fedflame.errors import UserError
from fedflame.experiment.method import build_strategy
from fedflame.experiment.prepare import prepare
from fedflame.experiment.run import Begun, run_experiment
from fedflame.messages import Adapter, ClientUpdate
from fedflame.privacy.audit import Attack, attack
from fedflame.report.records import read_run
from fedflame.server.progress import Reporter, Silent
from fedflame.strategies.base import ClientProfile, ServerState, Strategy, TrainInstructions
from fedflame.training.token_loss import row_losses

LETTERS = 12
"""Of the random prompt and of the random answer of a canary."""
_ROWS = 50
"""Canaries in a batch."""
_QUIET = {"evaluate_every": 0, "generate_every": 0, "max_new_tokens": 0}
"""The attack needs no score."""


@dataclass(frozen=True)
class Audited:
    """One attacked run."""

    attack: Attack
    epsilon: float | None
    """What the run claims for the client; None if it is not private."""


def audit(config: RunConfig, canaries: int, client: int) -> Audited:
    """Run a configuration with canaries among the rows of a client, and attack it.

    Args:
        config: the run; its folder is not touched.
        canaries: how many there are; about half of them are trained on.
        client: whose rows they are among.

    Raises:
        UserError: the client has no rows or is in no round, or what `prepare` and `run_experiment` refuse.
    """
    if not 0 <= client < config.clients.num_clients:
        raise UserError(f"client {client}: must be from 0 to {config.clients.num_clients - 1}")
    with tempfile.TemporaryDirectory() as temporary:
        run = Path(temporary) / "run"
        quiet = config.evaluation.model_copy(update=_QUIET)
        changes = {"output_dir": str(run), "report_to": (), "evaluation": quiet}
        prepared = prepare(config.model_copy(update=changes))
        rows, inside = _canaries(canaries, config.seed)
        among = _with_rows(
            prepared.federation, client, [row for row, there in zip(rows, inside, strict=True) if there]
        )
        method = build_strategy(config, prepared.shape.num_experts_per_tok)
        spy = _Spy(method, client, rows, config.privacy.secure_aggregation)
        run_experiment(replace(prepared, federation=among), strategy=spy, watch=spy.watch)
        if not spy.seen:
            raise UserError(
                f"client {client} was in no round of this run; name another one, or take more rounds"
            )
        spent = [event.epsilon for event in read_run(run).spent if event.client == client]
    return Audited(attack(spy.fallen, inside, config.privacy.delta), max(spent, default=None))


def _canaries(count: int, seed: int) -> tuple[list[Conversation], np.ndarray]:
    """Return canaries, and which of them are trained on, bool [count]."""
    draw = random.Random(f"fedflame-canaries-{seed}")

    def letters() -> str:
        return "".join(draw.choices(string.ascii_lowercase, k=LETTERS))

    rows = [single_turn(letters(), "", letters(), "all") for _ in range(count)]
    return rows, np.array([draw.random() < 0.5 for _ in range(count)])


def _with_rows(federation: Federation, client: int, rows: Sequence[Conversation]) -> Federation:
    """Return the federation with more rows for one client."""
    if not federation.parts[client]:
        raise UserError(f"client {client} has no row; name another one")
    first = len(federation.training)
    parts = [list(part) for part in federation.parts]
    parts[client] += range(first, first + len(rows))
    return replace(federation, training=[*federation.training, *rows], parts=parts)


@dataclass
class _Spy:
    """The method of the run, which looks at the updates of one client as the hub can."""

    method: Strategy
    client: int
    rows: Sequence[Conversation]
    summed: bool
    """Whether the hub sees one update for all clients that train with equal k."""
    fallen: np.ndarray = field(init=False)
    """[canaries] nats by which the loss of each fell with the client's updates, all rounds together."""
    seen: int = field(init=False, default=0)
    """How many updates these are."""

    def __post_init__(self) -> None:
        self.fallen = np.zeros(len(self.rows))
        self._given: TrainInstructions | None = None

    def watch(self, begun: Begun) -> AbstractContextManager[Reporter]:
        """Take the model of the run, which rests while an update is looked at."""
        self._experiment = begun.experiment
        encoded = encode_rows(self.rows, begun.experiment.encoder)
        self._encoded = [row for row in encoded if isinstance(row, EncodedRow)]
        if len(self._encoded) < len(self.rows):
            raise UserError(
                f"canaries cannot be encoded: {next(row for row in encoded if isinstance(row, str))}"
            )
        return nullcontext(Silent())

    def initialize(self, *arguments: object) -> ServerState:
        return self.method.initialize(*arguments)  # type: ignore[arg-type]

    def configure_train(self, state: ServerState, client: ClientProfile) -> TrainInstructions:
        instructions = self.method.configure_train(state, client)
        if client.client == self.client:
            self._given = instructions
        return instructions

    def aggregate_train(self, state: ServerState, updates: Iterable[ClientUpdate]) -> ServerState:
        self._given = None  # until the round asks the client, while it passes over the updates
        return self.method.aggregate_train(state, self._seen(state, updates))

    def _seen(self, state: ServerState, updates: Iterable[ClientUpdate]) -> Iterator[ClientUpdate]:
        for update in updates:
            if self._given is not None and self._has_client(update, self._given):
                given, merged = self._given, state.merged
                self.seen += 1
                before = self._losses(given.adapter, given.rescaler_values, merged, update.active_experts)
                after = given.adapter.combine(update.delta, torch.add)
                self.fallen += before - self._losses(
                    after, update.rescaler_values, merged, update.active_experts
                )
            yield update

    def _has_client(self, update: ClientUpdate, given: TrainInstructions) -> bool:
        if self.summed:
            return update.active_experts == given.active_experts
        return update.client == self.client

    @torch.no_grad()
    def _losses(self, adapter: Adapter, s: Tensor, merged: Adapter, k: int) -> np.ndarray:
        """Return the loss of each canary, in nats per token of its answer."""
        adapted, pad = self._experiment.adapted, pad_token(self._experiment.encoder.tokenizer)
        adapted.load(adapter, s, merged)
        found = []
        for start in range(0, len(self._encoded), _ROWS):
            batch = collate(self._encoded[start : start + _ROWS], pad)
            with adapted.active_experts(k):
                found.append(row_losses(adapted, batch).cpu())
        return torch.cat(found).double().numpy()
