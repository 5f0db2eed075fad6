"""Bytes up by k against the whole adapter in fp32, from the cells of the grid.

    python benchmarks/communication/table.py benchmarks/communication/results

The loss is in the comparison's own table.md.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from statistics import mean

from fedflame.compare.results import RESULTS, CellResult, read_results


def shares(cells: Iterable[CellResult]) -> dict[str, dict[int, float]]:
    """By method and k: mean bytes of an update over bytes of a plan, which is the whole adapter in fp32."""
    found: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for cell in cells:
        for update in cell.clients:
            found[cell.method][update.active_experts].append(update.bytes_up / update.bytes_down)
    return {method: {k: mean(values) for k, values in by_k.items()} for method, by_k in found.items()}


def main() -> None:
    """Print the table."""
    table = shares(read_results(Path(sys.argv[1]) / RESULTS).values())
    tiers = sorted(next(iter(table.values())), reverse=True)
    print("| update | " + " | ".join(f"k = {k}" for k in tiers) + " |")
    print("| --- |" + " --- |" * len(tiers))
    for method in ("float32", "bfloat16", "int8"):
        print(f"| {method} | " + " | ".join(f"{table[method][k]:.3f}" for k in tiers) + " |")


if __name__ == "__main__":
    main()
