"""The results of finished cells: the results file of a comparison, which all tables and curves are made from.

A results file has lines of JSON: the schema version, then one line for each cell, sorted by name. The process
of a cell leaves such a file in the cell's folder, and the process of the comparison takes its line over.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from fedflame.atomic_file import write_atomically
from fedflame.compare.devices import ClientWork, Devices, round_seconds
from fedflame.compare.grid import Cell
from fedflame.config.run_config import BESIDE_RESULTS, SCHEMA_VERSION
from fedflame.config.words import BestMetric
from fedflame.errors import UserError
from fedflame.json_text import to_text
from fedflame.reading import parse_object
from fedflame.report.events import Evaluation, ScoreName
from fedflame.report.measured import ClientScore, Measured
from fedflame.report.records import Run
from fedflame.run_files.standing import best_rounds, standings

RESULTS = "cells.jsonl"
"""The results file in the folder of a comparison."""


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
class OwnScores(Measured):
    """The final model at one client, on the rows that it holds out, with the k that it deploys."""

    client: int
    name: str
    rows: int
    """That it trains on."""
    test_rows: int
    active_experts: int
    loss: float | None
    exact_match: float | None
    rouge_l: float | None


@dataclass(frozen=True)
class CellResult:
    """One finished cell: a line of the results file."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True, ser_json_inf_nan="constants")

    cell: str
    """The name of the cell."""
    method: str
    setting: dict[str, str]
    seed: int
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
    config: dict[str, Any]
    """Resolved, without output_dir."""
    own: list[OwnScores] = field(default_factory=list)
    """By client, where clients are asked to score."""
    epsilon: float | None = None
    """The most that a client of a private run has spent; None if it was not private."""

    @property
    def rounds(self) -> int:
        """The number of the last round."""
        return max(evaluation.round for evaluation in self.evaluations)

    def tiers(self) -> list[int]:
        """Return every k that was evaluated, largest first."""
        return sorted({evaluation.active_experts for evaluation in self.evaluations}, reverse=True)

    def value(self, measure: str, tier: int, at: int) -> float | None:
        """Return a measure at one k after one round; None if it was not taken."""
        evaluation = self._evaluations.get((at, tier))
        return evaluation.value(measure) if evaluation else None

    @cached_property
    def _evaluations(self) -> dict[tuple[int, int], Evaluation]:
        return {(e.round, e.active_experts): e for e in self.evaluations}

    def last(self, measure: str, tier: int) -> float | None:
        """Return a measure of the final model at one k: after its last round, or its best if that is used."""
        return self.value(measure, tier, self._best.get(tier, self.rounds))

    @cached_property
    def _best(self) -> dict[int, int]:
        server = self.config.get("server", {})
        if not server.get("load_best_model_at_end"):
            return {}
        metric: BestMetric = server["metric_for_best_model"]
        values = [(e.round, e.active_experts, e.value(metric)) for e in self.evaluations]
        return best_rounds(standings(values, metric), self.rounds)

    def at(self, budget: int) -> Deployed | None:
        """Return what devices of this budget deploy; None if there are no such devices."""
        return next((deployed for deployed in self.deployed if deployed.budget == budget), None)

    def last_deployed(self, measure: str, budget: int) -> float | None:
        """Return a measure of the final model as devices of this budget deploy it."""
        deployed = self.at(budget)
        return deployed.value(measure) if deployed else None

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


_LINE = TypeAdapter(CellResult)
_HEAD = json.dumps({"schema_version": SCHEMA_VERSION})
_NO_CELL, _ANEW = "not the results of a cell", "delete the line to make it anew"


def read_results(path: Path) -> dict[str, CellResult]:
    """The finished cells of a results file by name; none where there is no file yet.

    Raises:
        UserError: it is no results file, is of another schema version, or has a line that is damaged or
            a second one of the same cell.
    """
    if not path.exists():
        return {}
    head, *lines = _lines(path)
    _check_head(path, head)
    results: dict[str, CellResult] = {}
    for number, line in enumerate(lines, start=2):
        result = _cell_of(line, f"{path}:{number}")
        if result.cell in results:
            raise UserError(f"{path}:{number}: {result.cell} has a line above; delete one of the two")
        results[result.cell] = result
    return results


def _lines(path: Path) -> list[bytes]:
    try:
        return path.read_bytes().splitlines() or [b""]
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; it must be a results file") from error


def _check_head(path: Path, head: bytes) -> None:
    try:
        version = parse_object(head)["schema_version"]
    except (ValueError, KeyError) as error:
        raise UserError(
            f"{path}: not a results file: its first line must be {_HEAD}; move it away"
        ) from error
    if version != SCHEMA_VERSION:
        raise UserError(
            f"{path}: has schema version {version!r}; this version of fedflame reads {SCHEMA_VERSION}: "
            "use the one that wrote it, or another --output-dir"
        )


def _cell_of(line: bytes, where: str) -> CellResult:
    try:
        return _LINE.validate_json(json.dumps(parse_object(line)))
    except ValidationError as error:
        first = error.errors()[0]
        what = ": ".join(filter(None, [".".join(map(str, first["loc"])), first["msg"]]))
        raise UserError(f"{where}: {_NO_CELL}: {what}; {_ANEW}") from error
    except ValueError as error:
        raise UserError(f"{where}: {_NO_CELL}: {error}; {_ANEW}") from error


def write_results(path: Path, results: Iterable[CellResult]) -> None:
    """Write a results file whole or not at all; UserError where the disk is full."""
    lines = [_line(result) for result in sorted(results, key=lambda result: result.cell)]
    write_atomically(path, b"".join(line + b"\n" for line in [_HEAD.encode(), *lines]))


def _line(result: CellResult) -> bytes:
    nothing = {name for name in ("own", "epsilon") if getattr(result, name) in ([], None)}
    text = _LINE.dump_json(result, exclude=nothing)  # as before there were any
    bare = b"NaN" in text or b"Infinity" in text  # as words of pydantic, or within a text
    return to_text(json.loads(text)).encode() if bare else text


def leave_result(cell: Cell, run: Run, training_flops: Mapping[int, float]) -> None:
    """Write what the cell's finished run has measured into the cell's folder; see `CellResult`.

    Raises:
        UserError: the disk is full.
    """
    write_results(_left(cell), [_result(cell, run, training_flops)])


def has_left_result(cell: Cell) -> bool:
    """Whether the cell is finished and waits to be taken over."""
    return _left(cell).exists()


def take_over(
    path: Path, results: Mapping[str, CellResult], cells: Iterable[Cell]
) -> Mapping[str, CellResult]:
    """Move what these cells have left into the results file; at any instant it is in one of them, or both.

    Args:
        path: the results file.
        results: what it holds.
        cells: those that may have left something in their folders.

    Returns:
        What the file then holds.

    Raises:
        UserError: the disk is full, or what a cell has left is damaged.
    """
    left = [_left(cell) for cell in cells if has_left_result(cell)]
    if not left:
        return results
    results = {**results, **{name: result for one in left for name, result in read_results(one).items()}}
    write_results(path, results.values())
    for one in left:
        one.unlink()
    return results


def _left(cell: Cell) -> Path:
    return cell.folder / "cell.jsonl"


def _result(cell: Cell, run: Run, training_flops: Mapping[int, float]) -> CellResult:
    return CellResult(
        cell.name,
        cell.method,
        dict(cell.setting),
        cell.config.seed,
        run.score_name(),
        [evaluation for evaluation in run.evaluations if evaluation.category is None],
        list(_client_work(cell, run)),
        dict(training_flops),
        run.environment,
        list(_deployed(cell, run, max(training_flops))),
        cell.config.model_dump(mode="json", exclude=BESIDE_RESULTS),
        list(_own_scores(run)),
        run.epsilon,
    )


def _own_scores(run: Run) -> Iterator[OwnScores]:
    """Yield what each client scored last, or after the round that its k uses."""
    final: dict[int, ClientScore] = {}
    for told in run.client_scores:
        if run.used_rounds.get(told.active_experts) in (None, told.round):
            final[told.client] = told
    trained = {client["client"]: client["rows"] for client in run.partition["clients"]}
    for client, told in sorted(final.items()):
        measures = told.loss, told.exact_match, told.rouge_l
        yield OwnScores(client, run.name(client), trained[client], told.rows, told.active_experts, *measures)


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
