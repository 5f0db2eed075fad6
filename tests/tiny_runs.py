"""Runs of a few seconds on the tiny model, in process or through the command line."""

from __future__ import annotations

import io
import time
from pathlib import Path
from subprocess import Popen
from typing import Any

from rich.console import Console
from tests.cli_process import CliProcess
from typer.testing import CliRunner, Result

from fedflame.cli import app
from fedflame.commands.run import print_run
from fedflame.config.load import load_config
from fedflame.config.run_config import RunConfig
from fedflame.experiment.prepare import prepare
from fedflame.experiment.run_folder import Existing
from fedflame.run_files.checkpoints import checkpoint_path, kept_rounds
from fedflame.run_files.lines import read_lines
from fedflame.wire.buffer import pack, unpack
from fedflame.wire.frame import opened

SETTINGS = (
    "data.max_rows=48",
    "data.max_length=120",
    "clients.num_clients=3",
    "clients.active_experts=4,2,1",
    "adapter.r=3",
    "training.max_steps=2",
    "training.per_device_train_batch_size=4",
    "server.num_server_rounds=3",
    "evaluation.rows_per_category=1",
    "evaluation.max_new_tokens=0",
    "evaluation.generate_every=0",
)
ANSWERS = "evaluation.max_new_tokens=2"
"""For runs whose answers are looked at; to generate them takes a fifth of a run."""
ONE_ROUND = "server.num_server_rounds=1"


def start_cli(*arguments: str | Path) -> CliProcess:
    """`fedflame` as a process of its own, on the threads that this one has."""
    return CliProcess([str(argument) for argument in arguments])


def set_options(*settings: str) -> list[str]:
    """These settings as options of a command."""
    return [part for setting in settings for part in ("--set", setting)]


def tiny_config(model: Path, run: Path, *overrides: str) -> RunConfig:
    """Three clients with k = 4, 2, 1 of K = 4, three rounds of two steps."""
    places = (f"model.model_name_or_path={model}", f"output_dir={run}")
    return load_config(None, [*SETTINGS, *places, *overrides])


def tiny_run(model: Path, run: Path, *overrides: str, existing: Existing = "refuse") -> str:
    """Run in process and return what the console showed."""
    shown = io.StringIO()
    print_run(prepare(tiny_config(model, run, *overrides), existing), "", Console(file=shown, width=100))
    return shown.getvalue()


def arguments(model: Path, run: Path, *overrides: str) -> list[str]:
    """The same run as arguments of `fedflame`."""
    return ["run", "--model", str(model), "--output-dir", str(run), *set_options(*SETTINGS, *overrides)]


def invoke(*command: str | Path) -> Result:
    """`fedflame` with these arguments, in process."""
    return CliRunner().invoke(app, [str(part) for part in command])


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    """The events of one kind in a run's metrics.jsonl."""
    return [event for event in read_lines(run / "metrics.jsonl") if event["event"] == kind]


def timeless(run: Path) -> list[dict[str, Any]]:
    """The events of a run's metrics.jsonl without what a clock wrote."""
    lines = read_lines(run / "metrics.jsonl")
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def wait_for_lines(process: CliProcess | Popen[str], run: Path, goal: int) -> None:
    """Until the run's metrics.jsonl has `goal` lines; fails if the process ends before."""
    metrics, deadline = run / "metrics.jsonl", time.monotonic() + 60
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < goal:
        assert process.poll() is None, "ended before it could be stopped"
        assert time.monotonic() < deadline, f"{goal} lines in a minute"
        time.sleep(0.002)


def adapter_bytes(run: Path) -> bytes:
    """The exported adapter of a finished run."""
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


def checkpoint_bytes(run: Path) -> bytes:
    """The run's last checkpoint."""
    return checkpoint_path(run, max(kept_rounds(run))).read_bytes()


def state_bytes(run: Path) -> bytes:
    """What the checkpoint hands to the next round: all but the length of metrics.jsonl, whose times vary."""
    tensors, header = unpack(opened(checkpoint_bytes(run)))
    del header["metrics_bytes"]
    return pack(tensors, header)
