"""What one update of a client tells the hub of its rows: membership of rows, and what most of them are about.

    python benchmarks/privacy/leaks.py

Both are asked of an update without privacy, and of the first update of runs with `privacy.unit = "row"`. In a
run of one round, this update spends the whole epsilon. Membership is asked of the mean of a group, too, which
is all that the hub sees with masked sums.
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

DELTA = 1e-5
Private = tuple[float, int] | None
"""Epsilon, and the rounds of the run in which it is spent; None without privacy."""
RUNS: tuple[Private, ...] = (None, (8.0, 1), (8.0, 5), (3.0, 1))
ROWS, TRIALS = 100, 16
GROUP = 3
"""The clients of a masked sum: as few as `privacy.min_group` allows by default."""
REFERENCES = 8
"""Clients that the hub plays itself, with rows of its own: what falls with theirs, too, tells nothing."""
OPEN_STEPS, PRIVATE_STEPS = 100, 20
"""Of 8 rows, and of 50."""
SITES, SITE_ROWS, SHARE, SITE_STEPS = 40, 60, 0.7, 10
"""Of a site's rows, this share is of one category; the others are of any."""


class Bench:
    """The embedded model, rows of every category, and the counts of the hub's own rows of each."""

    def __init__(self) -> None:
        self.adapted, tokenizer = load_adapted_model("olmoe-tiny", "float32", ADAPTER)
        self.pad, encoder = pad_token(tokenizer), new_encoder(tokenizer, 256)
        self.start, self.s = self.adapted.initial_adapter(0), torch.ones(len(self.adapted.layers))
        self.rows: dict[str, list[EncodedRow]] = {}
        for row in instructions(6000, 0, "train"):
            self.rows.setdefault(row.category, []).append(encode(row, encoder))
        self.every = [row for rows in self.rows.values() for row in rows]
        first = {name: self.rows[name][:SITE_ROWS] for name in sorted(self.rows)}
        self.profiles = {
            name: profile(self.update(rows, SITE_STEPS, None, 0)) for name, rows in first.items()
        }

    def update(self, rows: Sequence[EncodedRow], steps: int, run: Private, seed: int) -> ClientUpdate:
        """One round of a client; privately, its steps have half of its rows."""
        batch = len(rows) // 2 if run else 8
        plan = RoundPlan(1, 0, seed, 8, "fixed", self.s, self.start, 5e-3, 0.0, batch, steps)
        if run is None:
            return fine_tune(self.adapted, rows, plan, self.pad)
        epsilon, rounds = run
        private = {"clip_norm": 1.0, "clipping": "ghost", "target_epsilon": epsilon, "target_delta": DELTA}
        plan = RoundPlan(**vars(plan) | private | {"private_steps": rounds * steps})
        noise = Noise(simulated_secret(seed, 0), (f"{seed} {rounds}",))
        units = [[row] for row in rows]
        return fine_tune_privately(self.adapted, units, plan, self.pad, noise, lambda _: None)

    def losses(self, rows: Sequence[EncodedRow], *updates: ClientUpdate) -> np.ndarray:
        """Of each row, with the mean of some updates, or before any."""
        adapter = self.start
        for update in updates:
            adapter = adapter.combine(update.delta, lambda value, delta: value + delta / len(updates))
        self.adapted.load(adapter, self.s)
        with torch.no_grad(), self.adapted.active_experts(8):
            return row_losses(self.adapted, collate(rows, self.pad)).numpy()


def membership(bench: Bench, run: Private) -> np.ndarray:
    """AUC [trial,4] of telling 100 rows of a client from 100 others of the same kind.

    They are told by how far their losses fall, and by how much further than with the updates of the hub's own
    clients (difficulty calibration, arXiv 2111.08440): with the client's update, and with its group's mean.
    """
    shuffled = bench.every.copy()
    random.Random("membership").shuffle(shuffled)
    own, others = shuffled[: REFERENCES * ROWS], shuffled[REFERENCES * ROWS :]
    steps = PRIVATE_STEPS if run else OPEN_STEPS
    references = [
        bench.update(own[number * ROWS :][:ROWS], steps, run, TRIALS + number) for number in range(REFERENCES)
    ]
    drawn = [random.Random(trial).sample(others, 2 * ROWS) for trial in range(TRIALS)]
    updates = [bench.update(rows[:ROWS], steps, run, trial) for trial, rows in enumerate(drawn)]
    inside, found = np.arange(2 * ROWS) < ROWS, []
    for trial, rows in enumerate(drawn):
        before = bench.losses(rows)
        usual = before - np.mean([bench.losses(rows, update) for update in references], axis=0)
        group = [updates[(trial + number) % TRIALS] for number in range(GROUP)]
        fallen = [before - bench.losses(rows, *seen) for seen in ([updates[trial]], group)]
        scores = [one for fall in fallen for one in (fall, fall - usual)]
        found.append([attack(each, inside, DELTA).auc for each in scores])
    return np.array(found)


def profile(update: ClientUpdate) -> np.ndarray:
    """The counts of an update as frequencies, [L*E]."""
    counts = update.counts.double()
    return (counts / counts.sum(1, keepdim=True)).flatten().numpy()


def named_categories(bench: Bench, run: Private) -> int:
    """Of 40 sites, whose main category is told by the counts: it has the nearest profile of the hub's own."""
    own, names = bench.profiles, list(bench.profiles)
    right = 0
    for site in range(SITES):
        draw, main = random.Random(f"site {site}"), names[site % len(names)]
        of_main = draw.sample(bench.rows[main][SITE_ROWS:], round(SHARE * SITE_ROWS))
        others = draw.choices(bench.every, k=SITE_ROWS - len(of_main))
        seen = profile(bench.update([*of_main, *others], SITE_STEPS, run, site))
        right += main == min(names, key=lambda name: float(np.abs(own[name] - seen).sum()))
    return right


def in_words(run: Private) -> str:
    if run is None:
        return "none"
    epsilon, rounds = run
    return f"epsilon = {epsilon:g}, first update of a run of {rounds} round{'s' * (rounds > 1)}"


def main() -> None:
    torch.set_num_threads(1)
    bench = Bench()
    attacks = f"one update | beside own clients | sum of {GROUP} | beside own clients"
    print(f"| privacy | {attacks} | main category named |")
    print("| --- | --- | --- | --- | --- | --- |")
    for run in RUNS:
        aucs = [f"{auc.mean():.3f} ({auc.min():.2f} to {auc.max():.2f})" for auc in membership(bench, run).T]
        named = f"{named_categories(bench, run)} of {SITES}"
        print(f"| {in_words(run)} | {' | '.join(aucs)} | {named} |", flush=True)
    print(f"\n{len(bench.rows)} categories: guessing names {SITES / len(bench.rows):.0f} of {SITES}")


if __name__ == "__main__":
    main()
