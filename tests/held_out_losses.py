"""Losses of the held-out rows by k: what a run logged, and what `fedflame evaluate` says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.tiny_runs import SETTINGS, events, invoke, set_options

WITHOUT_ADAPTER = set_options(*(setting for setting in SETTINGS if "adapter" not in setting))
"""The settings of the tiny run for `fedflame evaluate` of an adapter folder, which has its own adapter's."""


def logged_losses(run: Path, round_number: int) -> dict[int, float]:
    """Those of all rows together after this round."""
    lines = [event for event in events(run, "evaluation") if event["category"] is None]
    return {line["active_experts"]: line["loss"] for line in lines if line["round"] == round_number}


def scores(*command: str | Path) -> dict[int, dict[str, dict[str, Any]]]:
    """What `fedflame evaluate` says with these arguments, by k and category."""
    result = invoke("evaluate", *command, "--json")
    assert result.exit_code == 0, result.stderr
    return {int(k): of_categories for k, of_categories in json.loads(result.stdout).items()}


def losses(*command: str | Path) -> dict[int, float]:
    """Those of all rows together."""
    return {k: of_categories["all"]["loss"] for k, of_categories in scores(*command).items()}
