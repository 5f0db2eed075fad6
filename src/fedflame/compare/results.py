"""The results of a finished cell: cell.json, written once, atomically, and read for all tables and curves."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from fedflame.atomic_file import write_atomically
from fedflame.compare.devices import ClientWork, Devices, round_seconds
from fedflame.compare.grid import Cell
from fedflame.errors import UserError
from fedflame.report.records import Evaluation, Measured, Run, ScoreName

FILE_NAME = "cell.json"


@dataclass(frozen=True)
class Spent:
    """The cost of all clients together, from the start of the run to the end of a round."""

    round: int
    training_flops: float
    bytes: float
    """Bytes sent, up and down."""
    simulated_seconds: float
    """Simulated time on unequal devices; see `devices`."""


@dataclass(frozen=True)
class Deployed(Measured):
    """How devices of one budget run the final model, and its loss and scores there."""

    budget: int
    """Experts per token that the device affords."""
    active_experts: int
    rank: int
    relative_flops: float | None
    """Forward FLOPs relative to K experts with the whole adapter; None if plan.json is missing."""
    loss: float | None
    exact_match: float | None
    rouge_l: float | None


@dataclass(frozen=True)
class CellResult:
    """The results of one finished cell."""

    score: ScoreName | None
    """The run's score by generation; None if there is none."""
    evaluations: list[Evaluation]
    """Evaluations on all held-out rows, at every k and round."""
    clients: list[ClientWork]
    training_flops: dict[int, float]
    """k -> FLOPs per trained token, for every client's budget and the model's K."""
    environment: dict[str, Any]
    deployed: list[Deployed]
    """One for each budget, largest first."""

    @property
    def rounds(self) -> int:
        """The number of the last round."""
        return max(evaluation.round for evaluation in self.evaluations)

    def tiers(self) -> list[int]:
        """Return every k that was evaluated, largest first."""
        return sorted({evaluation.active_experts for evaluation in self.evaluations}, reverse=True)

    def value(self, measure: str, tier: int, at: int) -> float | None:
        """Return a measure at one k after one round; None if it was not taken or is not finite."""
        evaluation = self._evaluations.get((at, tier))
        value = evaluation.value(measure) if evaluation else None
        return value if value is not None and math.isfinite(value) else None

    @cached_property
    def _evaluations(self) -> dict[tuple[int, int], Evaluation]:
        return {(e.round, e.active_experts): e for e in self.evaluations}

    def last(self, measure: str, tier: int) -> float | None:
        """Return a measure of the final model at one k."""
        return self.value(measure, tier, self.rounds)

    def at(self, budget: int) -> Deployed | None:
        """Return what devices of this budget deploy; None if there are no such devices."""
        return next((deployed for deployed in self.deployed if deployed.budget == budget), None)

    def last_deployed(self, measure: str, budget: int) -> float | None:
        """Return a measure of the final model as devices of this budget deploy it."""
        deployed = self.at(budget)
        value = deployed.value(measure) if deployed else None
        return value if value is not None and math.isfinite(value) else None

    def spent(self, devices: Devices) -> list[Spent]:
        """Return the cost after each round, from round 0 to the last."""
        of_round: dict[int, list[ClientWork]] = defaultdict(list)
        for cost in self.clients:
            of_round[cost.round].append(cost)
        points = [Spent(0, 0.0, 0, 0.0)]
        for at in range(1, self.rounds + 1):
            clients, before = of_round[at], points[-1]
            points.append(
                Spent(
                    at,
                    before.training_flops + sum(cost.training_flops for cost in clients),
                    before.bytes + sum(cost.bytes_up + cost.bytes_down for cost in clients),
                    before.simulated_seconds + round_seconds(clients, self.training_flops, devices),
                )
            )
        return points


def write_cell(cell: Cell, run: Run, training_flops: Mapping[int, float]) -> None:
    """Write cell.json from the cell's finished run; see `CellResult.training_flops`.

    Raises:
        UserError: the disk is full.
    """
    record = {
        "cell": cell.name,
        "method": cell.method,
        "setting": dict(cell.setting),
        "seed": cell.config.seed,
        "score": run.score_name(),
        "evaluations": [asdict(e) for e in run.evaluations if e.category is None],
        "clients": [asdict(cost) for cost in _client_work(cell, run)],
        "training_flops": training_flops,
        "environment": run.environment,
        "deployed": [asdict(deployed) for deployed in _deployed(cell, run, max(training_flops))],
        "config": run.config,
    }
    write_atomically(cell.folder / FILE_NAME, (json.dumps(record) + "\n").encode())


def _client_work(cell: Cell, run: Run) -> Iterator[ClientWork]:
    budgets = cell.config.afforded_experts()
    for update in run.updates:
        yield ClientWork(
            update.round,
            update.client,
            budgets[update.client],
            update.active_experts,
            update.tokens,
            update.seconds,
            update.training_flops,
            update.bytes_up,
            update.bytes_down,
        )


def _deployed(cell: Cell, run: Run, full: int) -> Iterator[Deployed]:
    """Yield what devices deploy, by budget. `full` is the model's K."""
    places = dict(zip(cell.config.afforded_experts(), cell.config.deployed(full), strict=True))
    whole = run.forward_flops_at(full, cell.config.adapter.r)
    cut = cell.config.cut_deployments(full)
    for budget, (k, rank) in sorted(places.items(), reverse=True):
        take = (k, rank) in cut
        loss, exact_match, rouge_l = (
            (run.deployed(measure, k, rank) if take else run.before_after(measure, k))[1]
            for measure in ("loss", "exact_match", "rouge_l")
        )
        flops = run.forward_flops_at(k, rank)
        relative = flops / whole if flops and whole else None
        yield Deployed(budget, k, rank, relative, loss, exact_match, rouge_l)


def is_finished(cell: Cell) -> bool:
    """Return whether the cell has written its results."""
    return (cell.folder / FILE_NAME).exists()


def read_cell(cell: Cell) -> CellResult:
    """Read the results of a finished cell. Raises UserError if cell.json is damaged."""
    path = cell.folder / FILE_NAME
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return CellResult(
            record["score"],
            [Evaluation(**evaluation) for evaluation in record["evaluations"]],
            [ClientWork(**cost) for cost in record["clients"]],
            {int(k): float(flops) for k, flops in record["training_flops"].items()},
            record["environment"],
            [Deployed(**deployed) for deployed in record["deployed"]],
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: not the results of a cell: {error!r}; delete it to make it again"
        ) from error
