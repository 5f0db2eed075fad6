"""The time of a private step over that of a step without privacy, on the same rows.

    python benchmarks/privacy/step.py

Every row is in every step, so that both go through the same tokens. The two are timed in turn.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from fedflame.base.adapted import load_adapted_model
from fedflame.bench.step import ADAPTER
from fedflame.data.encoder import new_encoder, pad_token
from fedflame.data.encoding import encode
from fedflame.data.skills import instructions
from fedflame.messages import RoundPlan
from fedflame.privacy.noise import Noise, simulated_secret
from fedflame.training.fine_tune import fine_tune
from fedflame.training.private import fine_tune_privately

STEPS, REPEATS, K, DELTA = 2, 5, (8, 1), 1e-5
ROWS = {"ghost": (64, 512), "row": (64,)}


def seconds(work: Callable[[], object]) -> float:
    begun = time.process_time()
    work()
    return (time.process_time() - begun) / STEPS


def main() -> None:
    torch.set_num_threads(1)
    adapted, tokenizer = load_adapted_model("olmoe-tiny", "float32", ADAPTER)
    pad, encoder = pad_token(tokenizer), new_encoder(tokenizer, 256)
    encoded = [encode(row, encoder) for row in instructions(512, 0, "train")]
    start, s = adapted.initial_adapter(0), torch.ones(len(adapted.layers))
    noise = Noise(simulated_secret(0, 0), ("step",))
    print("| clipping | rows | k | without, s | private, s | ratio |")
    print("| --- | --- | --- | --- | --- | --- |")
    for clipping, sizes in ROWS.items():
        for count in sizes:
            for k in K:
                rows = encoded[:count]
                plan = RoundPlan(1, 0, 0, k, "fixed", s, start, 5e-3, 0.0, count, STEPS)
                private = replace(
                    plan, clip_norm=1.0, clipping=clipping, noise_multiplier=1.0, target_delta=DELTA,
                    private_steps=STEPS,
                )  # fmt: skip
                units = [[row] for row in rows]
                both: dict[str, Callable[[], object]] = {
                    "without": lambda: fine_tune(adapted, rows, plan, pad),  # noqa: B023
                    "private": lambda: fine_tune_privately(adapted, units, private, pad, noise),  # noqa: B023
                }
                taken = {name: [seconds(work)] for name, work in both.items()}
                for _ in range(REPEATS):
                    for name, work in both.items():
                        taken[name].append(seconds(work))
                one, other = (statistics.median(taken[name][1:]) for name in both)
                cells = f"{clipping} | {count} | {k} | {one:.2f} | {other:.2f} | {other / one:.2f}"
                print(f"| {cells} |", flush=True)


if __name__ == "__main__":
    main()
