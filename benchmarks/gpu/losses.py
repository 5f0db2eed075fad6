"""Losses on the card beside those on the CPU: of single steps in float32, and of whole runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from findings import Findings
from sizes import ROOT, Sizes

from fedflame.base.loading import load_base_model
from fedflame.bench.step import adapt, step_optimizer, training_step
from fedflame.config.sections import TrainingConfig
from fedflame.data.batches import training_batches
from fedflame.data.encoder import new_encoder, pad_token
from fedflame.data.encoding import encode
from fedflame.data.skills import instructions
from fedflame.experiment.run import usable_cores

KEPT = ("event", "round", "client", "active_experts", "loss", "tokens", "seconds")
"""What is kept of an event."""
LARGER_MODEL = ROOT / "pretraining" / "olmoe-small"


def measure(sizes: Sizes, findings: Findings) -> None:
    devices = ("cpu", sizes.device)
    for k in (8, 1):
        with findings.attempt(f"losses of steps, k = {k}"):
            expected, found = (step_losses(device, k, sizes.loss_steps) for device in devices)
            findings.add("losses", active_experts=k, cpu=expected, card=found)
    runs: dict[str, list[str]] = {"olmoe-tiny on generated skills": []}
    if sizes.data:
        options = ["--model", str(LARGER_MODEL), "--data", str(sizes.data)]
        runs[f"olmoe-small on {sizes.data.name}"] = options
    for name, options in runs.items():
        with findings.attempt(f"run of {name}"):
            events = run_events(sorted(set(devices)), [*options, *settings(sizes)])
            expected, found = (events[device] for device in devices)
            for before, after in zip(expected, found, strict=True):
                findings.add("runs", run=name, cpu=before, card=after)


def step_losses(device: str, k: int, steps: int) -> list[float]:
    """The losses of so many steps of the embedded model on generated rows, in float32."""
    model, tokenizer = load_base_model("olmoe-tiny", "float32", device)
    adapted = adapt(model)
    optimizer = step_optimizer(adapted, TrainingConfig().learning_rate)
    encoder = new_encoder(tokenizer, 256)
    rows = [encode(row, encoder) for row in instructions(400, 0, "train")]
    batches = training_batches(rows, 8, pad_token(tokenizer), 0)
    return [float(training_step(adapted, optimizer, next(batches), k)()) for _ in range(steps)]


def settings(sizes: Sizes) -> list[str]:
    """Options of a short run in float32 whose answers are not generated."""
    common = ("model.dtype=float32", "evaluation.max_new_tokens=0")
    return [part for setting in (*common, *sizes.run) for part in ("--set", setting)]


def run_events(devices: list[str], options: list[str]) -> dict[str, list[dict[str, Any]]]:
    """What clients and evaluations of the same run have logged on each device; they run side by side."""
    with tempfile.TemporaryDirectory() as temporary:
        folders = {device: Path(temporary) / device for device in devices}
        running = [
            start_run(["--device", device, "--output-dir", str(folder), *options])
            for device, folder in folders.items()
        ]
        for process in running:
            _, errors = process.communicate()
            if process.returncode:
                raise RuntimeError(errors[-2000:])
        return {device: logged(folder) for device, folder in folders.items()}


def start_run(options: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "fedflame", "run", *options],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": str(max(1, usable_cores() // 2))},
    )


def logged(folder: Path) -> list[dict[str, Any]]:
    """The events with a loss, but those of single categories."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [
        {name: line.get(name) for name in KEPT}
        for line in lines
        if "loss" in line and not line.get("category")
    ]
