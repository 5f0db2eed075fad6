"""The runs, and the lines of those that are there."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hostile import ATTACKS, REFUSED, WITHIN

from fedflame.config.methods import NAMED_METHODS

RESULTS = Path(__file__).parent / "results" / "runs.jsonl"
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

TOLD = (("", 0), ("sign-flip at the bound", 1), ("sign-flip at the bound", 2))
"""The attacks that all methods are under, and by how many."""

ROBUST = ("trimmed_mean", "geometric_median")


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


def kept() -> dict[Case, dict[str, Any]]:
    """The lines that are there."""
    lines = map(json.loads, RESULTS.read_text().splitlines()) if RESULTS.exists() else ()
    names = Case.__dataclass_fields__
    return {Case(**{name: line[name] for name in names}): line for line in lines}
