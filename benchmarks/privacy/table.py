"""Loss, and exact match where answers were generated, by epsilon, method and k: means over the seeds.

    python benchmarks/privacy/table.py

It reads the finished cells of the grids beside it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from statistics import fmean, stdev

from fedflame.compare.comparison import Comparison
from fedflame.compare.files import read_comparison
from fedflame.compare.grid import Setting, read_grid
from fedflame.compare.results import CellResult
from fedflame.compare.tables import START, Entry, ResultTable, markdown
from fedflame.report.numbers import MISSING
from fedflame.report.results import tier_label

FOLDER = Path(__file__).parent
TABLES = {
    "Skills": ("open", "skills-20", "skills"),
    "Dolly": ("dolly-open", "dolly"),
    "What helps": ("helps",),
}
"""The grids of each table; the first of several has the runs without privacy."""


def finished(grid: str) -> Comparison:
    """What is finished of a grid."""
    results = FOLDER / "results" / grid
    return read_comparison(read_grid(FOLDER / f"{grid}.toml", [], str(results)), {})


def epsilon(setting: Setting) -> float:
    """The epsilon of a setting, infinite without privacy."""
    return float(dict(setting).get("privacy.epsilon", "inf"))


def entry(results: list[CellResult], k: int, first: bool = False) -> Entry:
    """Mean and deviation of the loss over seeds, and mean exact match, of the last round or the first."""

    def values(measure: str) -> list[float]:
        found = [of.value(measure, k, 0) if first else of.last(measure, k) for of in results]
        return [value for value in found if value is not None]

    losses, matches = values("loss"), values("exact_match")
    if not losses:
        return Entry(MISSING)
    spread = f" ± {stdev(losses):.3f}" if len(losses) > 1 else ""
    return Entry(f"{fmean(losses):.3f}{spread}" + (f", {fmean(matches):.0%}" if matches else ""))


def rows(comparison: Comparison) -> Iterator[list[Entry]]:
    """A row for each epsilon and method, from the largest epsilon."""
    for setting in sorted(comparison.settings(), key=epsilon, reverse=True):
        tiers = comparison.tiers(setting)
        for method in comparison.methods(setting):
            results = list(comparison.seeds(setting, method).values())
            entries = [entry(results, k) for k in tiers]
            yield [Entry(f"{epsilon(setting):g}"), Entry(method), Entry(str(len(results))), *entries]


def table(title: str, comparisons: list[Comparison]) -> ResultTable:
    """One table of some grids over the same rows."""
    tiers = comparisons[0].tiers(comparisons[0].settings()[0])
    results = list({result.seed: result for _, result in comparisons[0].finished}.values())
    start = [Entry(""), Entry(START), Entry(""), *(entry(results, k, first=True) for k in tiers)]
    body = [row for comparison in comparisons for row in rows(comparison)]
    return ResultTable(title, ["epsilon", "method", "seeds", *map(tier_label, tiers)], [start, *body])


def main() -> None:
    """Print the tables of all grids with a finished cell."""
    read = {title: [finished(grid) for grid in grids] for title, grids in TABLES.items()}
    begun = {title: [one for one in all_ if one.finished] for title, all_ in read.items()}
    print(markdown(table(title, some) for title, some in begun.items() if some))


if __name__ == "__main__":
    main()
