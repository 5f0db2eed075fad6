"""What it changes that a client weighs by the rows that it trained on, and not by all that it holds.

    python benchmarks/counted-rows/table.py

It reads the finished cells of the grids of main-table, which are by the rows trained on, and of those of the
same name here, by the rows held, and pairs those of the same method, setting and seed.
"""

from __future__ import annotations

from pathlib import Path

from fedflame.compare.comparison import Comparison
from fedflame.compare.files import read_comparison
from fedflame.compare.grid import Setting, read_grid
from fedflame.compare.intervals import paired_difference
from fedflame.compare.results import CellResult
from fedflame.compare.tables import Entry, ResultTable, markdown, setting_name
from fedflame.report.results import tier_label

BENCHMARKS = Path(__file__).parents[1]
GRIDS = "alpagasus", "dolly"


def finished(benchmark: str, grid: str) -> Comparison:
    """What is finished of a grid of the benchmarks."""
    folder = BENCHMARKS / benchmark
    path, results = folder / f"{grid}.toml", folder / "results" / grid
    return read_comparison(read_grid(path, [], str(results)), {})


def difference(trained: dict[int, CellResult], held: dict[int, CellResult], k: int) -> Entry:
    """Trained minus held at the same seeds: mean, interval, and at how many the loss is lower."""
    pairs = [
        (trained[seed].last("loss", k), held[seed].last("loss", k)) for seed in sorted(trained.keys() & held)
    ]
    differences = [one - other for one, other in pairs if one is not None and other is not None]
    found = paired_difference(differences)
    interval = "[{:+.3f}, {:+.3f}], ".format(*found.interval) if found.interval else ""
    lower = f"{sum(value < 0 for value in differences)} of {found.count} lower"
    return Entry(f"{found.mean:+.3f}", detail=interval + lower)


def table(grid: str, trained: Comparison, held: Comparison, setting: Setting) -> ResultTable:
    """Of one setting of a grid, by method and k."""
    tiers = held.tiers(setting)
    rows = []
    for method in held.methods(setting):
        seeds = trained.seeds(setting, method), held.seeds(setting, method)
        rows.append([Entry(method), *(difference(*seeds, k) for k in tiers)])
    return ResultTable(f"{grid}, {setting_name(setting)}", ["method", *map(tier_label, tiers)], rows)


def tables(grid: str) -> list[ResultTable]:
    """Of each setting of a grid that was measured by the rows held."""
    trained, held = finished("main-table", grid), finished("counted-rows", grid)
    return [table(grid, trained, held, setting) for setting in held.settings()]


def main() -> None:
    """Print the tables of all grids."""
    print(markdown(found for grid in GRIDS for found in tables(grid)))


if __name__ == "__main__":
    main()
