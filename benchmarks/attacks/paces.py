"""How alike honest updates are, by several measures of how far they went: what clipping goes by, and why.

    python benchmarks/attacks/paces.py

Runs the settings that are missing in results/paces.jsonl, one line for each update, and prints the table of
README.md. `--tables` prints what is there.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median_low
from typing import Any
from unittest.mock import patch

from fedflame.config.load import load_config
from fedflame.experiment.prepare import prepare
from fedflame.experiment.run import run_experiment
from fedflame.messages import ClientUpdate, RoundPlan
from fedflame.server import clipping
from fedflame.strategies.base import Past

RESULTS = Path(__file__).parent / "results" / "paces.jsonl"
ALWAYS = (
    "clients.num_clients=8",
    "clients.active_experts=8,8,4,4,2,2,1,1",
    "data.max_rows=1600",
    "training.max_steps=20",
    "server.num_server_rounds=5",
    "evaluation.rows_per_category=5",
    "evaluation.evaluate_every=0",
    "evaluation.generate_every=0",
    "evaluation.max_new_tokens=0",
    "strategy.clip=none",
)
SETTINGS: dict[str, tuple[str, ...]] = {
    "flame": (),
    "fedavg": ("strategy.name=fedavg",),
    "flame, equal compute": ("training.budget=compute",),
    "hetlora": ("strategy.name=hetlora",),
    "rolora": ("strategy.name=rolora",),
    "flora": ("strategy.name=flora",),
    "flame, Dirichlet 0.3, rate 0.02": ("data.alpha=0.3", "training.learning_rate=0.02"),
    "flame, 80 steps, 3 rounds": ("training.max_steps=80", "server.num_server_rounds=3"),
}
MEASURES: dict[str, Callable[[dict[str, Any]], float]] = {
    "norm": lambda one: one["norm"],
    "norm / (rate sqrt(steps))": lambda one: one["norm"] / (one["rate"] * math.sqrt(one["steps"])),
    "rms / (rate steps)": lambda one: one["norm"] / math.sqrt(one["moved"]) / (one["rate"] * one["steps"]),
    "pace: rms / (rate sqrt(steps))": lambda one: (
        one["norm"] / math.sqrt(one["moved"]) / (one["rate"] * math.sqrt(one["steps"]))
    ),
}


PACE = "pace: rms / (rate sqrt(steps))"
FACTORS = (1.0, 1.5, 2.0)


def measured(setting: str) -> list[dict[str, Any]]:
    """Run a setting and return a line for each update."""
    lines = []
    take = clipping.taken

    def noted(update: ClientUpdate, plan: RoundPlan) -> clipping.Taken:
        one = take(update, plan)
        lines.append(
            {
                "setting": setting,
                "round": plan.round,
                "client": plan.client,
                "k": plan.active_experts,
                "rate": plan.learning_rate,
                "steps": plan.max_steps,
                "norm": math.hypot(*(norm for kind, norm in one.norms.items() if kind != "rescaler")),
                "moved": clipping._movable(update),
                "rescaler": one.pace.rescaler,
            }
        )
        return one

    with tempfile.TemporaryDirectory() as folder, patch("fedflame.server.rounds.taken", noted):
        overrides = [*ALWAYS, *SETTINGS[setting], f"output_dir={folder}/run"]
        run_experiment(prepare(load_config(None, overrides)))
    return lines


def kept() -> dict[str, list[dict[str, Any]]]:
    """The lines that are there, by setting."""
    found = defaultdict(list)
    for line in RESULTS.read_text().splitlines() if RESULTS.exists() else ():
        one = json.loads(line)
        found[one["setting"]].append(one)
    return found


def largest(lines: list[dict[str, Any]], measure: Callable[[dict[str, Any]], float]) -> float:
    """Of all updates, the largest measure over the lower median of its round."""
    rounds = defaultdict(list)
    for one in lines:
        rounds[one["round"]].append(measure(one))
    return max(max(values) / median_low(values) for values in rounds.values())


def clipped(lines: list[dict[str, Any]], factor: float) -> tuple[int, int]:
    """How many deltas and learned rescalers `strategy.clip = "median"` would scale down with this factor."""
    past, deltas, rescalers = Past(), 0, 0
    rounds = defaultdict(list)
    for one in lines:
        rounds[one["round"]].append(clipping.Pace(MEASURES[PACE](one), one["rescaler"]))
    for _, paces in sorted(rounds.items()):
        known = past if past.paces else clipping.remembered(past, paces)
        with patch("fedflame.server.clipping.FACTOR", factor):
            most = clipping.limits(known, "median")
        deltas += sum(pace.delta > most.delta for pace in paces)
        rescalers += sum((pace.rescaler or 0.0) > most.rescaler for pace in paces)
        past = clipping.remembered(past, paces)
    return deltas, rescalers


def table(found: dict[str, list[dict[str, Any]]]) -> Iterator[str]:
    yield (
        "| setting | updates | "
        + " | ".join(MEASURES)
        + " | paces | "
        + " | ".join(f"clipped at {factor:g}" for factor in FACTORS)
        + " |"
    )
    yield "| --- | --- |" + " --- |" * (len(MEASURES) + 1 + len(FACTORS))
    for setting, lines in found.items():
        ratios = [f"{largest(lines, measure):.2f}" for measure in MEASURES.values()]
        paces = [MEASURES[PACE](one) for one in lines]
        scaled = ["{} and {}".format(*clipped(lines, factor)) for factor in FACTORS]
        cells = [setting, str(len(lines)), *ratios, f"{min(paces):.2f} to {max(paces):.2f}", *scaled]
        yield f"| {' | '.join(cells)} |"


def main() -> None:
    """Run what is missing, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tables", action="store_true", help="run nothing")
    told = parser.parse_args()
    for setting in SETTINGS:
        if not told.tables and setting not in kept():
            RESULTS.parent.mkdir(exist_ok=True)
            with RESULTS.open("a") as file:
                file.writelines(json.dumps(line) + "\n" for line in measured(setting))
    print("\n".join(table(kept())))


if __name__ == "__main__":
    main()
