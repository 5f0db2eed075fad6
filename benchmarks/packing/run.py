"""CPU time and peak memory of an epoch of short rows: padded, without padding, and packed.

    python benchmarks/packing/run.py

The embedded model trains one client on 256 rows: those of the embedded task, and random ones whose lengths
are spread. All layouts but the first have about as many tokens in a step. They take turns, five times, on one
thread; the figures are medians of CPU seconds, as ratios to padded rows in steps of as many tokens, and the
peak of torch's allocator over the first steps. It prints the table of README.md.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from fedflame.base.adapted import load_adapted_model
from fedflame.bench.measurement import one_thread, peak_bytes, seconds
from fedflame.config.sections import EMBEDDED_MODEL, AdapterConfig, DataConfig
from fedflame.data import skills
from fedflame.data.batches import training_batches
from fedflame.data.encoder import new_encoder, pad_token
from fedflame.data.encoding import EncodedRow, encode_rows
from fedflame.messages import RoundPlan
from fedflame.moe.adapted_model import AdaptedModel
from fedflame.training.fine_tune import fine_tune

ROWS, SEED, REPEATS, LONGEST, STEP = 256, 0, 5, 256, 512
FIRST_STEPS = 4
LAYOUTS: dict[str, dict[str, Any]] = {
    "padded, 8 rows": {"tokens_per_step": 0},
    "padded": {},
    "`padding_free`": {"padding_free": True},
    "`packing`": {"packed_length": LONGEST},
}


def spread_rows(vocabulary: int) -> list[EncodedRow]:
    """Random rows of 8 to 256 tokens, most of them short, a quarter of each a prompt."""
    draw = random.Random(SEED)
    lengths = [min(LONGEST, 8 + int(draw.expovariate(1 / 50))) for _ in range(ROWS)]
    return [
        EncodedRow([draw.randrange(3, vocabulary) for _ in range(length)], length // 4, False)
        for length in lengths
    ]


def steps_of_an_epoch(rows: Sequence[EncodedRow], plan: RoundPlan) -> tuple[int, float]:
    """Return the steps in which every row is trained on once, and the share of padding in them."""
    layout = plan.batch_size, 0, SEED, plan.tokens_per_step, plan.packed_length, plan.padding_free
    steps = trained = places = 0
    for batch in training_batches(rows, *layout):
        steps, trained, places = steps + 1, trained + batch.rows, places + batch.input_ids.numel()
        if trained == len(rows):
            break
    return steps, 1 - sum(len(row.ids) for row in rows) / places


def measured(adapted: AdaptedModel, rows: Sequence[EncodedRow], k: int, pad: int) -> list[str]:
    """Return the table's rows of this k."""
    plan = RoundPlan(
        round=1, client=0, seed=SEED, active_experts=k, rescaler="learned",
        rescaler_values=torch.ones(len(adapted.layers)), adapter=adapted.initial_adapter(SEED),
        learning_rate=5e-3, weight_decay=0.0, batch_size=8, max_steps=1, tokens_per_step=STEP,
    )  # fmt: skip
    plans, padding, peaks = {}, {}, {}
    for name, layout in LAYOUTS.items():
        laid_out = replace(plan, **layout)
        steps, padding[name] = steps_of_an_epoch(rows, laid_out)
        plans[name] = replace(laid_out, max_steps=steps)
        first = replace(laid_out, max_steps=FIRST_STEPS)
        peaks[name] = peak_bytes(lambda first=first: fine_tune(adapted, rows, first, pad), "cpu")
    taken: dict[str, list[float]] = {name: [] for name in plans}
    for _ in range(REPEATS):
        for name, one in plans.items():
            taken[name].append(seconds(lambda one=one: fine_tune(adapted, rows, one, pad), "cpu"))
    median = {name: statistics.median(times) for name, times in taken.items()}
    return [
        f"{k} | {name} | {plans[name].max_steps} | {padding[name]:.1%} | {median[name]:.2f} | "
        f"{median[name] / median['padded']:.2f} | {peaks[name] / 1e6:.0f} |"
        for name in plans
    ]


def main() -> None:
    adapted, tokenizer = load_adapted_model(EMBEDDED_MODEL, "float32", AdapterConfig())
    encoder = new_encoder(tokenizer, LONGEST, DataConfig())
    of_the_task = encode_rows(skills.instructions(ROWS, SEED, "train"), encoder)
    kinds = {
        "the embedded task": [row for row in of_the_task if not isinstance(row, str)],
        "spread lengths": spread_rows(adapted.vocabulary),
    }
    for name, rows in kinds.items():
        lengths = [len(row.ids) for row in rows]
        print(f"{name}: {min(lengths)} to {max(lengths)} tokens, {statistics.mean(lengths):.0f} in the mean")
    print("\n| rows | k | layout | steps | padding | CPU s | of padded | peak, MB |")
    print("| --- " * 8 + "|")
    with one_thread():
        for name, rows in kinds.items():
            for k in (8, 1):
                for line in measured(adapted, rows, k, pad_token(tokenizer)):
                    print(f"| {name} | {line}", flush=True)


if __name__ == "__main__":
    main()
