"""What hostile clients do to a run, with and without the defences, and what these cost where nobody attacks.

    python benchmarks/attacks/run.py

Runs what is missing in results/runs.jsonl, one line for each run, and prints the tables of README.md. It can
be stopped at any time. `--tables` prints what is there.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from cases import RESULTS, Case, cases, kept
from hostile import Liars
from tables import attack_table, method_table, price_table, robust_table, unclipped

from fedflame.clients.answers import Clients
from fedflame.config.load import load_config
from fedflame.errors import UserError
from fedflame.experiment import run as experiment_run
from fedflame.experiment.prepare import prepare
from fedflame.report.records import read_run

HOSTILE = {0: (), 1: (3,), 2: (3, 7)}
"""Of eight clients, those that afford k = 4 and k = 1."""


def measured(case: Case) -> dict[str, Any]:
    """Run a case and return its line."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        run = Path(folder) / "run"
        for change in changes(case):
            stack.enter_context(change)
        ended = ""
        try:
            config = load_config(None, [*case.overrides(), f"output_dir={run}"])
            experiment_run.run_experiment(prepare(config))
        except UserError as error:
            ended = str(error)
        found = read_run(run)
        events = [json.loads(line)["event"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = max((evaluation.round for evaluation in found.evaluations), default=0)
    losses = {
        str(e.active_experts): e.loss
        for e in found.evaluations
        if e.category is None and e.round == last == config.server.num_server_rounds
    }
    return {
        **vars(case),
        "loss": losses,
        "excluded": events.count("excluded"),
        "clipped": events.count("clipped"),
        "ended": ended,
        "seconds": round(time.monotonic() - start, 1),
    }


def changes(case: Case) -> Iterator[Any]:
    """Yield what a case changes in the program."""
    if case.defence == "off":
        yield patch("fedflame.server.rounds.require_within_reach", lambda *_: None)
    if case.defence.startswith("clip "):
        yield patch("fedflame.server.clipping.FACTOR", float(case.defence.removeprefix("clip ")))
    if case.attack:
        of_run = experiment_run._clients

        @contextmanager
        def with_liars(*given: Any) -> Iterator[Clients]:
            with of_run(*given) as clients:
                yield Liars(clients, HOSTILE[case.hostile], case.attack)

        yield patch.object(experiment_run, "_clients", with_liars)


def main() -> None:
    """Run what is missing, and print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tables", action="store_true", help="run nothing")
    parser.add_argument("--only", default="", help="run cases whose description has this text")
    told = parser.parse_args()
    for case in [] if told.tables else cases():
        there = kept()
        known = case.defence == "bound" and not case.attack and unclipped(there, case.seed)
        if case in there or known or told.only not in str(case):
            continue
        line = measured(case)
        print(line, flush=True)
        RESULTS.parent.mkdir(exist_ok=True)
        with RESULTS.open("a") as file:
            file.write(json.dumps(line) + "\n")
    for table in (attack_table, robust_table, method_table, price_table):
        print("\n".join(table(kept())), end="\n\n")


if __name__ == "__main__":
    main()
