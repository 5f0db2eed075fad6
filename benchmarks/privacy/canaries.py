"""What one attacked run proves of the mechanism: canaries in the gradients, each in by the toss of a coin.

    python benchmarks/privacy/canaries.py

The strongest rows that clipping lets through: each points along a direction of its own, with the clip norm as
its length, so that the hub reads it off the sum of all steps without any other row in the way. Sampling,
clipping and noise are those of a private round. Steinke, Nasr, Jagielski, arXiv 2305.08846.
"""

from __future__ import annotations

import numpy as np
import torch

from fedflame.privacy.accounting import Spending, epsilon_of
from fedflame.privacy.audit import attack
from fedflame.privacy.clipping import clip_factors
from fedflame.privacy.noise import Noise, simulated_secret

CANARIES, CLIP, DELTA = 2000, 1.0, 1e-5
LONG = 30.0
"""The length of a canary before it is clipped."""
MECHANISMS = (Spending(1.0, 1.0, 1), Spending(1.0, 4.0, 20), Spending(0.1, 0.7, 30), Spending(0.1, 1.5, 30))


def scores(spent: Spending, inside: np.ndarray, noise_scale: float = 1.0) -> np.ndarray:
    """What all noised sums of a round hold along each canary's direction."""
    noise = Noise(simulated_secret(0, 0), (str(spent),))
    present = np.flatnonzero(inside)
    found = torch.zeros(len(inside))
    for step in range(spent.steps):
        sampled = torch.as_tensor(present[noise.sample(len(present), spent.sampling_rate, step)])
        lengths = torch.full((len(sampled),), LONG)
        total = torch.zeros(len(inside))
        total[sampled] = lengths * clip_factors(lengths, CLIP)
        deviation = noise_scale * spent.noise_multiplier * CLIP
        found += noise.added_to({"canaries": total}, deviation, step)["canaries"]
    return found.numpy()


def main() -> None:
    inside = np.random.default_rng(0).random(CANARIES) < 0.5
    print("| sampled, noise, steps | epsilon claimed | proved | AUC | proved with half of the noise |")
    print("| --- | --- | --- | --- | --- |")
    for spent in MECHANISMS:
        right = attack(scores(spent, inside), inside, DELTA)
        wrong = attack(scores(spent, inside, 0.5), inside, DELTA)
        what = f"{spent.sampling_rate:g}, {spent.noise_multiplier:g}, {spent.steps}"
        found = (epsilon_of([spent], DELTA), right.proved_epsilon, right.auc, wrong.proved_epsilon)
        print("|", " | ".join([what, *(f"{value:.2f}" for value in found)]), "|")


if __name__ == "__main__":
    main()
