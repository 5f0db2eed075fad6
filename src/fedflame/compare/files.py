"""Write the files of a comparison, results.json, table.md and report.html, each atomically."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from fedflame.atomic_file import write_atomically
from fedflame.compare.comparison import Comparison
from fedflame.compare.grid import Cell, Grid
from fedflame.compare.page import page
from fedflame.compare.results import RESULTS, CellResult, read_results
from fedflame.compare.tables import device_table, markdown, setting_name, setting_tables
from fedflame.json_text import to_text

IN_TABLE = (
    "fedflame",
    "python",
    "torch",
    "transformers",
    "peft",
    "platform",
    "processor",
    "cpus",
    "threads",
    "device",
    "gpu",
    "dtype",
)
"""The facts on the environment that table.md shows; the page shows all."""


def read_comparison(grid: Grid, failures: dict[str, str]) -> Comparison:
    """The finished cells of a grid. Raises UserError as `read_results` does."""
    kept = read_results(grid.output_dir / RESULTS)
    results = {cell.name: kept[cell.name] for cell in grid.cells if cell.name in kept}
    return Comparison(grid, results, failures)


def write_comparison(comparison: Comparison) -> list[Path]:
    """Write results.json, table.md and report.html into the grid's folder, and return their paths.

    Raises:
        UserError: the disk is full.
    """
    folder = comparison.grid.output_dir
    contents = {
        "results.json": to_text(_records(comparison), indent=1) + "\n",
        "table.md": _text(comparison),
        "report.html": page(comparison, folder.resolve().name),
    }
    for name, content in contents.items():
        write_atomically(folder / name, content.encode())
    return [folder / name for name in contents]


def _text(comparison: Comparison) -> str:
    parts = []
    for setting in comparison.settings():
        heading = f"## {setting_name(setting)}\n\n" if setting else ""
        tables = [*setting_tables(comparison, setting), device_table(comparison, setting)]
        parts.append(heading + markdown(tables))
    environment = comparison.environment()
    facts = [f"{key} {environment[key]}" for key in IN_TABLE if key in environment]
    return "\n".join([*parts, f"Environment: {'; '.join(facts)}.\n"])


def _records(comparison: Comparison) -> dict[str, Any]:
    grid = comparison.grid
    return {
        "baseline": grid.baseline,
        "devices": grid.devices.model_dump(),
        "cells": [_record(comparison, cell, result) for cell, result in comparison.finished],
        "failed": dict(comparison.failures),
    }


def _record(comparison: Comparison, cell: Cell, result: CellResult) -> dict[str, Any]:
    tiers, measures = result.tiers(), ("loss", "exact_match", "rouge_l")
    return {
        "cell": cell.name,
        "method": cell.method,
        "setting": dict(cell.setting),
        "seed": cell.config.seed,
        "final": {k: {name: result.last(name, k) for name in measures} for k in tiers},
        "rounds": [
            asdict(spent) | {"loss": {k: result.value("loss", k, spent.round) for k in tiers}}
            for spent in result.spent(comparison.grid.devices)
        ],
    }
