"""What hostile clients do to a run, with and without the defences, and what these cost where nobody attacks.

    python benchmarks/attacks/run.py

Runs what is missing in results/runs.jsonl, one line for each run, and prints the tables of README.md. It can
be stopped at any time. `--tables` prints what is there. Hostile clients answer plans as the others do; a
wrapper around the clients falsifies their answers before the rounds see them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from fedflame.clients.answers import Answer, Clients, OnStep
from fedflame.clients.local import LocalClients
from fedflame.compare.intervals import paired_difference
from fedflame.config.load import load_config
from fedflame.config.methods import NAMED_METHODS
from fedflame.data.encoding import EncodedRow
from fedflame.errors import UserError
from fedflame.experiment import run as experiment_run
from fedflame.experiment.prepare import prepare
from fedflame.messages import ClientUpdate, RoundPlan
from fedflame.report.records import read_run
from fedflame.server.validation import believed, most_rows
from fedflame.training.reach import longest_way, trained_reach
from fedflame.wire.codec import decode_plan, decode_update, encode_update

RESULTS = Path(__file__).parent / "results" / "runs.jsonl"
HOSTILE = {0: (), 1: (3,), 2: (3, 7)}
"""Of eight clients, those that afford k = 4 and k = 1."""
SETTINGS = (
    "clients.num_clients=8",
    "clients.active_experts=8,8,4,4,2,2,1,1",
    "data.max_rows=1600",
    "training.max_steps=5",
    "server.num_server_rounds=4",
    "evaluation.rows_per_category=5",
    "evaluation.evaluate_every=0",
    "evaluation.generate_every=0",
    "evaluation.max_new_tokens=0",
)

FACTORS = {"clip 1": "1", "clip": "1.5, the default"}
TOLD = (("", 0), ("sign-flip at the bound", 1), ("sign-flip at the bound", 2))
"""The attacks that all methods are under, and by how many."""

ROBUST = ("trimmed_mean", "geometric_median")

Falsify = Callable[[ClientUpdate, RoundPlan], ClientUpdate]


# Attacks


def times(factor: float) -> Falsify:
    """The delta times a number."""

    def falsify(update: ClientUpdate, plan: RoundPlan) -> ClientUpdate:
        delta = update.delta.combine(update.delta, lambda value, _: factor * value)
        return replace(update, delta=delta)

    return falsify


def false_counts(update: ClientUpdate, plan: RoundPlan) -> ClientUpdate:
    """Every token is said to have gone to the k experts that were used most; what others learned is zero."""
    used = update.counts.topk(plan.active_experts, dim=1).indices
    counts = torch.zeros_like(update.counts).scatter_(1, used, update.tokens)
    experts = {
        name: torch.where(
            (counts[int(name.split(".")[0])] > 0).view(-1, *[1] * (value.dim() - 1)), value, 0.0
        )
        for name, value in update.delta.experts.items()
    }
    return replace(update, counts=counts, delta=replace(update.delta, experts=experts))


def counts_and_flip(update: ClientUpdate, plan: RoundPlan) -> ClientUpdate:
    return times(-10.0)(false_counts(update, plan), plan)


def rescaler(s: float) -> Falsify:
    """A learned rescaler of this value in every layer."""

    def falsify(update: ClientUpdate, plan: RoundPlan) -> ClientUpdate:
        if plan.rescaler == "fixed":
            return update
        return replace(update, rescaler_values=torch.full_like(update.rescaler_values, s))

    return falsify


def false_rows(update: ClientUpdate, plan: RoundPlan) -> ClientUpdate:
    return replace(update, num_examples=2**40, trained_examples=2**40)


def flip_at_the_bound(update: ClientUpdate, plan: RoundPlan) -> ClientUpdate:
    """Every value against the direction in which it should go, as far as AdamW could have moved it."""
    furthest = 0.99 * trained_reach(plan)
    return replace(
        update, delta=update.delta.combine(update.delta, lambda value, _: -furthest * value.sign())
    )


def rescaler_at_the_bound(update: ClientUpdate, plan: RoundPlan) -> ClientUpdate:
    if plan.rescaler != "learned":
        return update
    furthest = 0.99 * longest_way(plan)
    return replace(update, rescaler_values=plan.rescaler_values - furthest)


ATTACKS: dict[str, Falsify] = {
    "delta x 1e6": times(1e6),
    "sign-flip x 10": times(-10.0),
    "false counts, sign-flip x 10": counts_and_flip,
    "sign-flip at the bound": flip_at_the_bound,
    "rescaler at the bound": rescaler_at_the_bound,
    "rescaler 1e6": rescaler(1e6),
    "rescaler -1": rescaler(-1.0),
    "2^40 rows": false_rows,
    "NaN": times(float("nan")),
    "wrong labels": lambda update, plan: update,
}
LABELS = "wrong labels"
"""The client trains as told, on the responses of other rows."""
WITHIN = (LABELS, "sign-flip at the bound", "rescaler at the bound")
"""Attacks that go no further than AdamW can."""

REFUSED = ("2^40 rows", "NaN")
"""Answers that no round takes, whatever the defence."""


@dataclass(frozen=True)
class Liars:
    """The clients of a run, some of whose answers are falsified."""

    clients: LocalClients
    hostile: Sequence[int]
    attack: str

    def train(self, plans: Iterable[tuple[int, bytes]], on_step: OnStep) -> Iterator[Answer]:
        asked: deque[bytes] = deque()

        def noted() -> Iterator[tuple[int, bytes]]:
            for client, plan in plans:
                asked.append(plan)
                yield client, plan

        for answer in self._who_trains().train(noted(), on_step):
            yield self._falsified(answer, decode_plan(asked.popleft()))

    def evaluate(self, plans: Iterable[tuple[int, bytes]]) -> Iterator[Answer]:
        return self.clients.evaluate(plans)

    def test_rows(self) -> Sequence[int | None]:
        return self.clients.test_rows()

    def num_examples(self) -> Sequence[int]:
        return self.clients.num_examples()

    def name(self, client: int) -> str:
        return self.clients.name(client)

    def believed_rows(self, client: int) -> int:
        return self.clients.believed_rows(client)

    def believed(self, update: ClientUpdate) -> ClientUpdate:
        """What a hub believes of sites."""
        return believed(update, most_rows(self.num_examples()))

    def _who_trains(self) -> Clients:
        if self.attack != LABELS:
            return self.clients
        rows = list(self.clients.rows)
        for client in self.hostile:
            rows[client] = with_responses_of_others(rows[client])
        return replace(self.clients, rows=rows)

    def _falsified(self, answer: Answer, plan: RoundPlan) -> Answer:
        if plan.client not in self.hostile or not answer.update:
            return answer
        update = ATTACKS[self.attack](decode_update(answer.update, plan), plan)
        return replace(answer, update=encode_update(update, plan))


def with_responses_of_others(rows: Sequence[EncodedRow]) -> list[EncodedRow]:
    """Each prompt with the response of the row after the next."""
    others = [*rows[2:], *rows[:2]]
    return [
        replace(row, ids=row.ids[: row.prompt_length] + other.ids[other.prompt_length :])
        for row, other in zip(rows, others, strict=True)
    ]


# Runs


@dataclass(frozen=True)
class Case:
    """One run."""

    method: str
    attack: str
    """Empty if nobody attacks."""
    hostile: int
    defence: str
    """`off`: neither the bound of AdamW nor clipping. `bound`: the bound alone. `clip`: both, the default;
    a number after it is another factor than 1.5. Or `strategy.robust` on top of both."""
    seed: int = 0

    def overrides(self) -> list[str]:
        chosen = [f"strategy.name={self.method}", f"seed={self.seed}", *SETTINGS]
        if self.defence in ("off", "bound"):
            chosen.append("strategy.clip=none")
        elif not self.defence.startswith("clip"):
            chosen.append(f"strategy.robust={self.defence}")
        return chosen


def cases() -> list[Case]:
    """All runs, those that tell most first."""
    defences = ("off", "bound", "clip")
    alone = [Case("flame", "", 0, d) for d in defences]
    one, two = ([Case("flame", a, n, d) for a in ATTACKS for d in differing(a)] for n in (1, 2))
    price = [Case("flame", "", 0, d, seed) for seed in range(5) for d in ("clip", "clip 1", "bound")]
    robust = [Case("flame", *told, rule) for told in TOLD for rule in ROBUST]
    others = [method for method in NAMED_METHODS if method != "flame"]
    rest = [Case(m, *told, d) for told in TOLD for m in others for d in ("bound", "clip")]
    return [*alone, *one, *robust, *price, *two, *rest]


def differing(attack: str) -> Sequence[str]:
    """Defences that an attack meets: some are refused in any case, and some go no further than AdamW."""
    if attack in REFUSED:
        return ("clip",)
    return ("bound", "clip") if attack in WITHIN else ("off", "bound", "clip")


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


def kept() -> dict[Case, dict[str, Any]]:
    """The lines that are there."""
    lines = map(json.loads, RESULTS.read_text().splitlines()) if RESULTS.exists() else ()
    names = Case.__dataclass_fields__
    return {Case(**{name: line[name] for name in names}): line for line in lines}


# Tables


def loss(line: dict[str, Any] | None) -> str:
    """Of the final model at every k."""
    if line is None:
        return "not run"
    if not line["loss"]:
        return "ended"
    return " / ".join(f"{value:.2f}" if value is not None else "NaN" for value in line["loss"].values())


def attack_table(lines: dict[Case, dict[str, Any]]) -> Iterator[str]:
    yield "| attack | hostile | off | bound | clip |"
    yield "| --- | --- | --- | --- | --- |"
    for attack, hostile in [("", 0), *itertools.product(ATTACKS, (1, 2))]:
        met = differing(attack)
        cells = [
            loss(lines.get(Case("flame", attack, hostile, d))) if d in met else "as on its right"
            for d in ("off", "bound", "clip")
        ]
        yield f"| {attack or 'none'} | {hostile} | {' | '.join(cells)} |"


def method_table(lines: dict[Case, dict[str, Any]]) -> Iterator[str]:
    yield "| method | defence | " + " | ".join(f"{attack or 'none'}, {n} of 8" for attack, n in TOLD) + " |"
    yield "| --- | --- |" + " --- |" * len(TOLD)
    for method, defence in itertools.product(NAMED_METHODS, ("bound", "clip")):
        cells = [loss(lines.get(Case(method, *one, defence))) for one in TOLD]
        yield f"| {method} | {defence} | {' | '.join(cells)} |"


def robust_table(lines: dict[Case, dict[str, Any]]) -> Iterator[str]:
    yield "| mean | " + " | ".join(f"{attack or 'none'}, {n} of 8" for attack, n in TOLD) + " |"
    yield "| --- |" + " --- |" * len(TOLD)
    for defence in ("clip", *ROBUST):
        cells = [loss(lines.get(Case("flame", *one, defence))) for one in TOLD]
        yield f"| {'weighted' if defence == 'clip' else defence} | {' | '.join(cells)} |"


def price_table(lines: dict[Case, dict[str, Any]]) -> Iterator[str]:
    ks = ("8", "4", "2", "1")
    yield "| factor | seeds | clipped updates | " + " | ".join(f"k = {k}" for k in ks) + " |"
    yield "| --- | --- | --- |" + " --- |" * len(ks)
    for defence, factor in FACTORS.items():
        pairs = [
            (plain, lines[Case("flame", "", 0, defence, seed)])
            for seed in range(5)
            if (plain := unclipped(lines, seed)) and Case("flame", "", 0, defence, seed) in lines
        ]
        if not pairs:
            continue
        found = [paired_difference([b["loss"][k] - a["loss"][k] for a, b in pairs]) for k in ks]
        cells = [
            f"{one.mean:+.4f}" + (" [{:+.4f}, {:+.4f}]".format(*one.interval) if one.interval else "")
            for one in found
        ]
        yield f"| {factor} | {len(pairs)} | {sum(b['clipped'] for _, b in pairs)} | {' | '.join(cells)} |"


def unclipped(lines: dict[Case, dict[str, Any]], seed: int) -> dict[str, Any] | None:
    """Return the run of a seed without clipping; one in which nothing was clipped is the same bit for bit."""
    clipped = lines.get(Case("flame", "", 0, "clip", seed))
    return clipped if clipped and not clipped["clipped"] else lines.get(Case("flame", "", 0, "bound", seed))


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
