"""The tables of README.md, from the lines of the runs that are there."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from cases import ROBUST, TOLD, Case, differing
from hostile import ATTACKS

from fedflame.compare.intervals import paired_difference
from fedflame.config.methods import NAMED_METHODS

FACTORS = {"clip 1": "1", "clip": "1.5, the default"}


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
