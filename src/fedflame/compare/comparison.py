"""The finished cells of a grid side by side: by setting, method and seed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean
from typing import Any

from fedflame.compare.devices import client_seconds
from fedflame.compare.grid import Cell, Grid, Setting
from fedflame.compare.intervals import Difference, Summary, paired_difference, summarize
from fedflame.compare.results import CellResult, Deployed, Spent
from fedflame.report.records import ScoreName

Reading = Callable[[CellResult, str, int], float | None]
"""A measure of a final model in one column of a table: `CellResult.last` at a k, `CellResult.last_deployed`
on the devices of a budget."""


@dataclass(frozen=True)
class Point:
    """A measure after one round, and what had been spent by then; means over seeds."""

    spent: Spent
    summary: Summary


@dataclass(frozen=True)
class DeviceCost:
    """What the clients of one budget did over a whole run, summed over them; means over seeds."""

    budget: int
    clients: float
    active_experts: str
    """What they trained with, such as `1` or `8, 4`."""
    tokens: float
    training_flops: float
    bytes_up: float
    bytes_down: float
    busy_seconds: float
    """Simulated, per client."""


@dataclass(frozen=True)
class Comparison:
    """A grid and the results of its finished cells by name, in the order of the grid."""

    grid: Grid
    results: Mapping[str, CellResult]
    failures: Mapping[str, str]
    """Why a cell has no results, by its name."""

    @cached_property
    def finished(self) -> list[tuple[Cell, CellResult]]:
        """Cells with results, in the order of the grid."""
        return [(cell, self.results[cell.name]) for cell in self.grid.cells if cell.name in self.results]

    def settings(self) -> list[Setting]:
        """Those in which a cell is finished."""
        return list(dict.fromkeys(cell.setting for cell, _ in self.finished))

    def seeds(self, setting: Setting, method: str) -> dict[int, CellResult]:
        """The results of one method by seed."""
        return {
            cell.config.seed: result
            for cell, result in self.finished
            if (cell.setting, cell.method) == (setting, method)
        }

    def methods(self, setting: Setting) -> list[str]:
        """Those with a finished cell, in the order of the file."""
        return [method for method in self.grid.methods if self.seeds(setting, method)]

    def tiers(self, setting: Setting) -> list[int]:
        """Every k at which some method was evaluated, largest first."""
        return sorted({k for r in self._results(setting) for k in r.tiers()}, reverse=True)

    def score(self, setting: Setting) -> ScoreName | None:
        """The score by generation of this setting's data."""
        return next((result.score for result in self._results(setting) if result.score), None)

    def _results(self, setting: Setting) -> Iterator[CellResult]:
        return (result for cell, result in self.finished if cell.setting == setting)

    def budgets(self, setting: Setting) -> list[int]:
        """What the devices of the cells afford, largest first."""
        return sorted({d.budget for r in self._results(setting) for d in r.deployed}, reverse=True)

    def deployed(self, setting: Setting, method: str, budget: int) -> Deployed | None:
        """What the devices of one budget deploy, of the first seed; k and rank are those of all seeds."""
        return next((r.at(budget) for r in self.seeds(setting, method).values()), None)

    def final(
        self, setting: Setting, method: str, measure: str, column: int, reading: Reading = CellResult.last
    ) -> Summary | None:
        """Of the final models; None where no seed has the measure."""
        values = self._final_by_seed(setting, method, measure, column, reading).values()
        return summarize(list(values)) if values else None

    def start(self, setting: Setting, method: str, measure: str, tier: int) -> Summary | None:
        """Of the models before training."""
        taken = [r.value(measure, tier, 0) for r in self.seeds(setting, method).values()]
        values = [value for value in taken if value is not None]
        return summarize(values) if values else None

    def difference(
        self, setting: Setting, method: str, measure: str, column: int, reading: Reading = CellResult.last
    ) -> Difference | None:
        """The method minus the baseline at the same seed; None where they share none."""
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
        """The rounds at which every seed has the measure."""
        results = list(self.seeds(setting, method).values())
        spent = [result.spent(self.grid.devices) for result in results]
        points = []
        for at in range(min((len(rounds) for rounds in spent), default=0)):
            values = [result.value(measure, tier, at) for result in results]
            known = [value for value in values if value is not None]
            if len(known) == len(values):
                points.append(Point(_mean([rounds[at] for rounds in spent]), summarize(known)))
        return points

    def total(self, setting: Setting, method: str) -> Spent:
        """What a whole run spends; the mean over seeds."""
        return _mean([r.spent(self.grid.devices)[-1] for r in self.seeds(setting, method).values()])

    def environment(self) -> dict[str, str]:
        """Where the finished cells ran: a value, or several where they differ."""
        return values_by_key(result.environment for result in self.results.values())

    def device_costs(self, setting: Setting, method: str) -> list[DeviceCost]:
        """What the clients of each budget did, the largest budget first."""
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
    """The values that occur under each key, in order, comma-separated."""
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
