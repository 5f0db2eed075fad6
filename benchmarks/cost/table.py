"""What a client's training costs by device, from the cells of a comparison at equal steps.

    python benchmarks/cost/table.py benchmarks/main-table/results/dolly

FLOPs are those of the cost model (docs/flops.md), for the tokens that were trained on; bytes are those that
travelled. All are means over clients, rounds, seeds and settings.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from fedflame.compare.results import RESULTS, CellResult, read_results

MEGABYTE = 1_000_000
Key = tuple[str, int]
"""Method, and the k that the device affords."""


def totals(cells: Iterable[CellResult]) -> dict[Key, dict[str, float]]:
    """Sums over the updates of each method and device."""
    found: dict[Key, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for cell in cells:
        for update in cell.clients:
            place = found[cell.method, update.budget]
            place["updates"] += 1
            for name in ("tokens", "training_flops", "bytes_up", "bytes_down"):
                place[name] += getattr(update, name)
    return found


def table(found: dict[Key, dict[str, float]], amount: str, per: str, unit: float) -> str:
    """In Markdown, by method and device: `amount` per `per`, in this unit."""
    tiers = sorted({k for _, k in found}, reverse=True)
    rows = [["method", *(f"k = {k}" for k in tiers)], ["---"] * (1 + len(tiers))]
    for method in dict.fromkeys(method for method, _ in found):
        places = [found[method, k] for k in tiers]
        rows.append([method, *(f"{place[amount] / place[per] / unit:.2f}" for place in places)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    """Print the tables."""
    cells = read_results(Path(sys.argv[1]) / RESULTS).values()
    found = totals(cell for cell in cells if cell.config["training"]["budget"] == "steps")
    for title, *what in (
        ("MFLOP per token", "training_flops", "tokens", 1e6),
        ("MB of an update", "bytes_up", "updates", MEGABYTE),
        ("MB of a plan", "bytes_down", "updates", MEGABYTE),
    ):
        print(f"{title}\n\n{table(found, *what)}\n")


if __name__ == "__main__":
    main()
