"""The results of a grid's finished cells, by setting, method and seed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean
from typing import Any

from fedflame.compare.devices import client_seconds
from fedflame.compare.grid import Cell, Grid, Setting
from fedflame.compare.intervals import Difference, Summary, paired_difference, summarize
from fedflame.compare.results import CellResult, Deployed, OwnScores, Spent
from fedflame.report.events import ScoreName

Reading = Callable[[CellResult, str, int], float | None]
"""Reads a measure of the final model for one column of a table: `CellResult.last` for a k,
`CellResult.last_deployed` for the devices of a budget."""


@dataclass(frozen=True)
class Point:
    """A measure after one round, and the cost up to then; means over seeds."""

    spent: Spent
    summary: Summary


@dataclass(frozen=True)
class DeviceCost:
    """The cost of a whole run for the clients of one budget, summed over the clients; means over seeds."""

    budget: int
    clients: float
    active_experts: str
    """The k that they trained with, such as `1` or `8, 4`."""
    tokens: float
    training_flops: float
    bytes_up: float
    bytes_down: float
    busy_seconds: float
    """Simulated seconds per client."""


@dataclass(frozen=True)
class Comparison:
    """A grid, and the results of its finished cells by name."""

    grid: Grid
    results: Mapping[str, CellResult]
    failures: Mapping[str, str]
    """Name of a cell without results -> why it failed."""

    @cached_property
    def finished(self) -> list[tuple[Cell, CellResult]]:
        """The cells with results, in the order of the grid."""
        return [(cell, self.results[cell.name]) for cell in self.grid.cells if cell.name in self.results]

    def settings(self) -> list[Setting]:
        """Return the settings with a finished cell."""
        return list(dict.fromkeys(cell.setting for cell, _ in self.finished))

    def seeds(self, setting: Setting, method: str) -> dict[int, CellResult]:
        """Return seed -> result of one method."""
        return {
            cell.config.seed: result
            for cell, result in self.finished
            if (cell.setting, cell.method) == (setting, method)
        }

    def methods(self, setting: Setting) -> list[str]:
        """Return the methods with a finished cell, in the order of the file."""
        return [method for method in self.grid.methods if self.seeds(setting, method)]

    def tiers(self, setting: Setting) -> list[int]:
        """Return every k at which a method was evaluated, largest first."""
        return sorted({k for r in self._results(setting) for k in r.tiers()}, reverse=True)

    def score(self, setting: Setting) -> ScoreName | None:
        """Return the score by generation in this setting; None if there is none."""
        return next((result.score for result in self._results(setting) if result.score), None)

    def _results(self, setting: Setting) -> Iterator[CellResult]:
        """Yield the results of the methods; bounds have tables of their own."""
        return (
            result
            for cell, result in self.finished
            if cell.setting == setting and cell.method in self.grid.methods
        )

    def own_scores(self, setting: Setting, method: str) -> dict[int, dict[int, OwnScores]]:
        """Return client -> seed -> the final model of a method or bound there; of standalone, its own."""
        found: dict[int, dict[int, OwnScores]] = {}
        for cell, result in self.finished:
            if (cell.setting, cell.method) == (setting, method):
                for own in result.own:
                    found.setdefault(own.client, {})[cell.config.seed] = own
        return dict(sorted(found.items()))

    def budgets(self, setting: Setting) -> list[int]:
        """Return the budgets of the devices, largest first."""
        return sorted({d.budget for r in self._results(setting) for d in r.deployed}, reverse=True)

    def deployed(self, setting: Setting, method: str, budget: int) -> Deployed | None:
        """Return what devices of one budget deploy, for the first seed. All seeds have its k and rank."""
        return next((r.at(budget) for r in self.seeds(setting, method).values()), None)

    def final(
        self, setting: Setting, method: str, measure: str, column: int, reading: Reading = CellResult.last
    ) -> Summary | None:
        """Summarize a measure of the final models; None if no seed has it."""
        values = self._final_by_seed(setting, method, measure, column, reading).values()
        return summarize(list(values)) if values else None

    def start(self, setting: Setting, method: str, measure: str, tier: int) -> Summary | None:
        """Summarize a measure of the models before training; None if no seed has it."""
        taken = [r.value(measure, tier, 0) for r in self.seeds(setting, method).values()]
        values = [value for value in taken if value is not None]
        return summarize(values) if values else None

    def difference(
        self, setting: Setting, method: str, measure: str, column: int, reading: Reading = CellResult.last
    ) -> Difference | None:
        """Return the paired difference of method minus baseline; None if they have no seed in common."""
        mine = self._final_by_seed(setting, method, measure, column, reading)
        theirs = self._final_by_seed(setting, self.grid.baseline, measure, column, reading)
        pairs = [value - theirs[seed] for seed, value in mine.items() if seed in theirs]
        return paired_difference(pairs) if pairs else None

    def _final_by_seed(
        self, setting: Setting, method: str, measure: str, column: int, reading: Reading
    ) -> dict[int, float]:
        taken = {seed: reading(r, measure, column) for seed, r in self.seeds(setting, method).items()}
        return {seed: value for seed, value in taken.items() if value is not None}

    def curve(self, setting: Setting, method: str, measure: str, tier: int) -> list[Point]:
        """Return the points of a curve, for the rounds at which every seed has a finite measure."""
        results = list(self.seeds(setting, method).values())
        spent = [result.spent(self.grid.devices) for result in results]
        points = []
        for at in range(min((len(rounds) for rounds in spent), default=0)):
            values = [result.value(measure, tier, at) for result in results]
            known = [value for value in values if value is not None]
            if len(known) == len(values) and all(map(math.isfinite, known)):
                points.append(Point(_mean([rounds[at] for rounds in spent]), summarize(known)))
        return points

    def total(self, setting: Setting, method: str) -> Spent:
        """Return the cost of a whole run; the mean over seeds."""
        return _mean([r.spent(self.grid.devices)[-1] for r in self.seeds(setting, method).values()])

    def epsilon(self, setting: Setting, method: str) -> float | None:
        """Return the most that a client has spent in the seeds of a method; None if they are not private."""
        spent = [result.epsilon for result in self.seeds(setting, method).values()]
        return max((epsilon for epsilon in spent if epsilon is not None), default=None)

    def environment(self) -> dict[str, str]:
        """Return the environment of the finished cells; a key lists several values if the cells differ."""
        return values_by_key(result.environment for result in self.results.values())

    def device_costs(self, setting: Setting, method: str) -> list[DeviceCost]:
        """Return the costs by budget, the largest budget first."""
        results = list(self.seeds(setting, method).values())
        budgets = sorted({cost.budget for result in results for cost in result.clients}, reverse=True)
        return [self._device_cost(results, budget) for budget in budgets]

    def _device_cost(self, results: list[CellResult], budget: int) -> DeviceCost:
        def mean(name: str) -> float:
            return float(sum(getattr(cost, name) for _, cost in costs)) / len(results)

        costs = [(r, cost) for r in results for cost in r.clients if cost.budget == budget]
        clients = fmean(len({c.client for r, c in costs if r is result}) for result in results)
        seconds = sum(client_seconds(cost, r.training_flops, self.grid.devices) for r, cost in costs)
        trained = sorted({cost.active_experts for _, cost in costs}, reverse=True)
        return DeviceCost(
            budget,
            clients,
            ", ".join(map(str, trained)),
            mean("tokens"),
            mean("training_flops"),
            mean("bytes_up"),
            mean("bytes_down"),
            seconds / len(results) / clients,
        )


def values_by_key(records: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Return key -> all its values, in order, comma-separated."""
    found: dict[str, dict[str, None]] = {}
    for record in records:
        for key, value in record.items():
            found.setdefault(key, {})[str(value)] = None
    return {key: ", ".join(values) for key, values in found.items()}


def _mean(points: list[Spent]) -> Spent:
    return Spent(
        points[0].round,
        fmean(point.training_flops for point in points),
        fmean(point.bytes for point in points),
        fmean(point.simulated_seconds for point in points),
    )
