"""FLAME against FedAvg with k = min and with k = 8 on Dolly-15k: three seeds, eight unequal clients.

    python benchmarks/dolly-tiers/run.py --data dolly-15k.jsonl.gz --work WORK_FOLDER

Each experiment and seed is one `fedflame run` on one thread; those that are finished in the work
folder are not run again, those that were cut off go on. The figures go to results/, the table into
README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
EXPERIMENTS = {
    "flame": "FLAME, own k, t = 2",
    "fedavg-k-min": "FedAvg, all k = 1",
    "fedavg-k-8": "FedAvg, all k = 8 (bound)",
}
SEEDS = (0, 1, 2)
TIERS = (8, 4, 2, 1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="dolly-15k.jsonl.gz")
    parser.add_argument("--work", type=Path, required=True, help="folder for the run folders")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time, one thread each")
    arguments = parser.parse_args()
    cells = [(name, seed) for seed in SEEDS for name in EXPERIMENTS]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        runs = list(pool.map(lambda cell: run_cell(*cell, arguments.data, arguments.work), cells))
    for (name, seed), run in zip(cells, runs, strict=True):
        result = HERE / "results" / f"{name}-seed-{seed}.json"
        result.write_text(json.dumps(summarize(run), indent=1) + "\n")
    (HERE / "README.md").write_text(readme())


def run_cell(name: str, seed: int, data: Path, work: Path) -> Path:
    """Run one experiment with one seed, or go on with it; returns the run folder."""
    run = work / f"{name}-seed-{seed}"
    if (run / "adapter").is_dir():
        return run
    command = [sys.executable, "-m", "fedflame", "run", str(HERE / "experiments" / f"{name}.toml")]
    command += ["--data", str(data), "--output-dir", str(run), "--set", f"seed={seed}"]
    command += ["--resume"] if (run / "config.json").exists() else []
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    return run


def summarize(run: Path) -> dict[str, Any]:
    """Losses and ROUGE-L by k before and after, cost by k, and the environment, of one run."""
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    together = [e for e in events if e["event"] == "evaluation" and e["category"] is None]
    last = max(e["round"] for e in together)
    updates = [e for e in events if e["event"] == "client"]
    environment = json.loads((run / "environment.json").read_text())
    scores = {
        moment: {
            e["active_experts"]: {name: e[name] for name in ("loss", "rouge_l", "rows", "response_tokens")}
            for e in together
            if e["round"] == number
        }
        for moment, number in (("before", 0), ("after", last))
    }
    rescalers = {e["active_experts"]: e["rescaler"] for e in updates if e["round"] == last}
    totals = {
        name: sum(e[name] for e in updates) for name in ("tokens", "training_flops", "bytes_up", "seconds")
    }
    return {**scores, "rescalers": rescalers, "totals": totals, "environment": environment}


def readme() -> str:
    results = {
        name: [json.loads((HERE / "results" / f"{name}-seed-{seed}.json").read_text()) for seed in SEEDS]
        for name in EXPERIMENTS
    }
    environment = results["flame"][0]["environment"]
    return TEXT.format(
        loss=table(results, "loss"),
        rouge=table(results, "rouge_l"),
        paired=paired(results, "fedavg-k-min") + "\n" + paired(results, "fedavg-k-8"),
        cost=cost_table(results),
        rescalers=rescaler_table(results["flame"]),
        environment=", ".join(
            f"{key} {environment[key]}" for key in ("python", "torch", "transformers", "peft")
        ),
        platform=f"{environment['platform']}, {environment['cpus']} cores, base in {environment['dtype']}",
        rows=results["flame"][0]["after"]["8"]["rows"],
    )


def table(results: dict[str, list[dict[str, Any]]], measure: str) -> str:
    """Mean over seeds and, in brackets, each seed."""
    lines = [
        f"| {measure} | " + " | ".join(f"k = {k}" for k in TIERS) + " |",
        "| --- " * (len(TIERS) + 1) + "|",
    ]
    base = [cell(results["flame"], "before", str(k), measure) for k in TIERS]
    lines.append("| base model | " + " | ".join(base) + " |")
    for name, label in EXPERIMENTS.items():
        runs = results[name]
        lines.append(f"| {label} | " + " | ".join(cell(runs, "after", str(k), measure) for k in TIERS) + " |")
    return "\n".join(lines)


def cell(runs: list[dict[str, Any]], moment: str, k: str, measure: str) -> str:
    values = [run[moment][k][measure] for run in runs]
    return f"**{statistics.mean(values):.3f}** ({', '.join(f'{value:.3f}' for value in values)})"


def paired(results: dict[str, list[dict[str, Any]]], other: str) -> str:
    """FLAME's loss minus the other's, seed by seed."""
    cells = []
    for k in TIERS:
        pairs = zip(results["flame"], results[other], strict=True)
        gaps = [mine["after"][str(k)]["loss"] - theirs["after"][str(k)]["loss"] for mine, theirs in pairs]
        cells.append(f"{statistics.mean(gaps):+.3f} ({', '.join(f'{gap:+.3f}' for gap in gaps)})")
    return f"| FLAME minus {EXPERIMENTS[other]} | " + " | ".join(cells) + " |"


def cost_table(results: dict[str, list[dict[str, Any]]]) -> str:
    lines = [
        "| mean over seeds | tokens trained | training TFLOP | MB up | client seconds |",
        "| --- " * 5 + "|",
    ]
    for name, label in EXPERIMENTS.items():
        mean = {
            key: statistics.mean(run["totals"][key] for run in results[name])
            for key in results[name][0]["totals"]
        }
        lines.append(
            f"| {label} | {mean['tokens']:,.0f} | {mean['training_flops'] / 1e12:.2f} "
            f"| {mean['bytes_up'] / 1e6:.1f} | {mean['seconds']:.0f} |"
        )
    return "\n".join(lines)


def rescaler_table(runs: list[dict[str, Any]]) -> str:
    lines = ["| s per layer, last round, seed 0 | " + " | ".join(f"layer {n}" for n in range(4)) + " |"]
    lines.append("| --- " * 5 + "|")
    for k in TIERS:
        values = runs[0]["rescalers"][str(k)]
        lines.append(f"| k = {k} | " + " | ".join(f"{value:.3f}" for value in values) + " |")
    return "\n".join(lines)


TEXT = """# Dolly-15k over eight unequal clients

FLAME against FedAvg with every client at the smallest k (the paper's trivial baseline), and against
FedAvg with every client at k = 8, which an unequal federation cannot afford. The base is the embedded
model `olmoe-tiny`; Dolly was not in its pre-training. The paper used OLMoE-1B-7B: nothing here
says what would come out there.

8 clients, k = 8, 8, 4, 4, 2, 2, 1, 1, Dirichlet(0.5) over category, a seeded sample of 4,000 rows of at
most 160 tokens (longer ones truncated), 5 rounds of 12 steps of 8 rows, AdamW at 3e-3 falling by a
cosine over the rounds, LoRA r = 8 on every expert and on q, k, v, o. Seeds 0, 1, 2 change sample,
partition, adapter and batches, and are the same for all methods. {rows} held-out rows, 20 per category.
The learning rate was not tuned per method.

    python benchmarks/dolly-tiers/run.py --data dolly-15k.jsonl.gz --work WORK_FOLDER

## Response loss of the global model, nats per token

Mean over seeds, and each seed.

{loss}

Differences, seed by seed (below zero: FLAME is better):

| loss | k = 8 | k = 4 | k = 2 | k = 1 |
| --- | --- | --- | --- | --- |
{paired}

## ROUGE-L of greedy answers of at most 24 tokens

{rouge}

## Cost

{cost}

Client seconds were taken with two runs at a time on two cores and are no measure of speed.

## Rescaler

Rows: the tier's last client of that round.

{rescalers}

## Environment

{environment}; {platform}.
"""


if __name__ == "__main__":
    main()
