"""What it changes that a client weighs by the rows that it trained on, and not by all that it holds.

    python benchmarks/counted-rows/table.py TRAINED HELD

Both are folders of finished comparisons. Every cell of one is paired with that of the other with the same
method, data, skew, protocol and seed.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from fedflame.compare.intervals import paired_difference

Place = tuple[str, float, str, str]
"""Data set, alpha of the partition, protocol and method."""
Losses = dict[int, float]
"""Of the final model, by k."""


def final_losses(folder: Path) -> dict[Place, dict[int, Losses]]:
    """By place and seed."""
    found: dict[Place, dict[int, Losses]] = defaultdict(dict)
    for path in sorted(folder.glob("cells/*/cell.json")):
        cell: dict[str, Any] = json.loads(path.read_text())
        data, budget = cell["config"]["data"], cell["config"]["training"]["budget"]
        last = max(evaluation["round"] for evaluation in cell["evaluations"])
        found[Path(data["dataset_name"]).name, data["alpha"], budget, cell["method"]][cell["seed"]] = {
            e["active_experts"]: e["loss"] for e in cell["evaluations"] if e["round"] == last
        }
    return found


def difference(trained: dict[int, Losses], held: dict[int, Losses], k: int) -> str:
    """Trained minus held at the same seeds: mean, interval, and at how many the loss is lower."""
    differences = [trained[seed][k] - held[seed][k] for seed in sorted(trained.keys() & held)]
    found = paired_difference(differences)
    interval = "[{:+.3f}, {:+.3f}], ".format(*found.interval) if found.interval else ""
    return f"{found.mean:+.3f} {interval}{sum(value < 0 for value in differences)} of {found.count} lower"


def main() -> None:
    """Print a table for each data set, skew and protocol."""
    trained, held = (final_losses(Path(folder)) for folder in sys.argv[1:3])
    places = [place for place in trained if place in held and trained[place].keys() & held[place].keys()]
    for setting in dict.fromkeys(place[:3] for place in places):
        tiers = sorted(next(iter(trained[*setting, places[0][3]].values())), reverse=True)
        rows = [["method", *(f"k = {k}" for k in tiers)], ["---"] * (1 + len(tiers))]
        for place in places:
            if place[:3] == setting:
                rows.append([place[3], *(difference(trained[place], held[place], k) for k in tiers)])
        dataset, alpha, budget = setting
        print(f"{dataset}, Dirichlet({alpha:g}), equal {budget}\n")
        print("\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n")


if __name__ == "__main__":
    main()
