"""What one update of a client tells the hub of its rows: membership of rows, and what most of them are about.

    python benchmarks/privacy/leaks.py

Both are asked of an update without privacy, and of the first update of a run with `privacy.unit = "row"`:
of one round, which spends the whole epsilon in this update, and of five.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import torch

from fedflame.base.adapted import load_adapted_model
from fedflame.bench.step import ADAPTER
from fedflame.data.batches import collate
from fedflame.data.encoder import new_encoder, pad_token
from fedflame.data.encoding import EncodedRow, encode
from fedflame.data.skills import instructions
from fedflame.messages import ClientUpdate, RoundPlan
from fedflame.privacy.audit import attack
from fedflame.privacy.noise import Noise, simulated_secret
from fedflame.training.fine_tune import fine_tune
from fedflame.training.private import fine_tune_privately
from fedflame.training.token_loss import row_losses

EPSILON, DELTA = 8.0, 1e-5
ROUNDS = (0, 1, 5)
"""Of the run in which epsilon is spent; the update is that of its first round. 0: without privacy."""
ROWS, TRIALS = 100, 16
OPEN_STEPS, PRIVATE_STEPS = 100, 20
"""Of 8 rows, and of 50."""
SITES, SITE_ROWS, SHARE, SITE_STEPS = 40, 60, 0.7, 10
"""Of a site's rows, this share is of one category; the others are of any."""


class Bench:
    """The embedded model, and rows of every category."""

    def __init__(self) -> None:
        self.adapted, tokenizer = load_adapted_model("olmoe-tiny", "float32", ADAPTER)
        self.pad, encoder = pad_token(tokenizer), new_encoder(tokenizer, 256)
        self.start, self.s = self.adapted.initial_adapter(0), torch.ones(len(self.adapted.layers))
        self.rows: dict[str, list[EncodedRow]] = {}
        for row in instructions(6000, 0, "train"):
            self.rows.setdefault(row.category, []).append(encode(row, encoder))

    def update(self, rows: Sequence[EncodedRow], steps: int, rounds: int, seed: int) -> ClientUpdate:
        """One round of a client; privately, its steps have half of its rows."""
        batch = len(rows) // 2 if rounds else 8
        plan = RoundPlan(1, 0, seed, 8, "fixed", self.s, self.start, 5e-3, 0.0, batch, steps)
        if not rounds:
            return fine_tune(self.adapted, rows, plan, self.pad)
        private = {"clip_norm": 1.0, "clipping": "ghost", "target_epsilon": EPSILON, "target_delta": DELTA}
        plan = RoundPlan(**vars(plan) | private | {"private_steps": rounds * steps})
        noise = Noise(simulated_secret(seed, 0), (f"{seed} {rounds}",))
        units = [[row] for row in rows]
        return fine_tune_privately(self.adapted, units, plan, self.pad, noise, lambda _: None)

    def losses(self, rows: Sequence[EncodedRow], update: ClientUpdate | None) -> np.ndarray:
        adapter = self.start if update is None else self.start.combine(update.delta, torch.add)
        self.adapted.load(adapter, self.s)
        with torch.no_grad(), self.adapted.active_experts(8):
            return row_losses(self.adapted, collate(rows, self.pad)).numpy()


def membership(bench: Bench, rounds: int) -> list[float]:
    """AUC of telling 100 rows of a client from 100 others of the same kind, by how far their losses fall."""
    every = [row for rows in bench.rows.values() for row in rows]
    found = []
    for trial in range(TRIALS):
        drawn = random.Random(trial).sample(every, 2 * ROWS)
        update = bench.update(drawn[:ROWS], PRIVATE_STEPS if rounds else OPEN_STEPS, rounds, trial)
        fallen = bench.losses(drawn, None) - bench.losses(drawn, update)
        found.append(attack(fallen, np.arange(2 * ROWS) < ROWS, DELTA).auc)
    return found


def profile(update: ClientUpdate) -> np.ndarray:
    """The counts of an update as frequencies, [L*E]."""
    counts = update.counts.double()
    return (counts / counts.sum(1, keepdim=True)).flatten().numpy()


def named_categories(bench: Bench, rounds: int) -> int:
    """Of 40 sites, whose main category is told by the counts: it has the nearest profile of the hub's own."""
    names = sorted(bench.rows)
    own = {name: profile(bench.update(bench.rows[name][:SITE_ROWS], SITE_STEPS, 0, 0)) for name in names}
    right = 0
    for site in range(SITES):
        draw, main = random.Random(f"site {site}"), names[site % len(names)]
        of_main = draw.sample(bench.rows[main][SITE_ROWS:], round(SHARE * SITE_ROWS))
        every = [row for rows in bench.rows.values() for row in rows]
        others = draw.choices(every, k=SITE_ROWS - len(of_main))
        seen = profile(bench.update([*of_main, *others], SITE_STEPS, rounds, site))
        right += main == min(names, key=lambda name: float(np.abs(own[name] - seen).sum()))
    return right


def main() -> None:
    torch.set_num_threads(1)
    bench = Bench()
    seen = f"membership, AUC: mean (least to most of {TRIALS} clients)"
    print(f"| privacy | {seen} | main category named, of {SITES} sites |")
    print("| --- | --- | --- |")
    for rounds in ROUNDS:
        auc = membership(bench, rounds)
        spread = f"{np.mean(auc):.3f} ({min(auc):.2f} to {max(auc):.2f})"
        privacy = f"epsilon = {EPSILON:g}, spent in {rounds} rounds" if rounds else "none"
        print(f"| {privacy} | {spread} | {named_categories(bench, rounds)} |", flush=True)
    print(f"\n{len(bench.rows)} categories: guessing names {SITES / len(bench.rows):.0f} of {SITES}")


if __name__ == "__main__":
    main()
