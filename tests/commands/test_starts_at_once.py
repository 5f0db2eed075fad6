"""What needs no weights loads no torch: help, plans, checks, and every refusal that can be known before."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("torch", "datasets", "peft", "scipy", "flwr", "nvflare", "rouge_score")
CHILD = """
import gc, json, sys
gc.disable()  # so that importing takes less
from typer.testing import CliRunner
from fedflame.base import device
from fedflame.cli import app
from fedflame.page_server import PageServer

device.DRIVERS = ()  # a machine without a card
PageServer.serve_forever = lambda self: None  # it ends at once

heavy, commands = json.loads(sys.argv[1])
for command in commands:
    result = CliRunner().invoke(app, command)
    line = (result.stdout + result.stderr).strip().splitlines()[-1]
    print(json.dumps([result.exit_code, line, [name for name in heavy if name in sys.modules]]))
"""
SITE = """
name = "site-1"
[data]
dataset_name = "rows.jsonl"
[trainer]
active_experts = 4
"""
HUB = 'sites = "a,b"\n[nvflare]\nadmin_kit = "kit"\n'
FULL = "(the model's num_experts_per_tok)"


def shown(folder: Path, *commands: str) -> list[tuple[int, str]]:
    """Exit code and last line of each command, all in one process, which must load no heavy package."""
    arguments = json.dumps([HEAVY, [command.split() for command in commands]])
    done = subprocess.run(
        [sys.executable, "-c", CHILD, arguments], cwd=folder, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(lines) == len(commands)
    assert [(command, heavy) for command, (_, _, heavy) in zip(commands, lines, strict=True) if heavy] == []
    return [(code, line) for code, line, _ in lines]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the commands run: a site's file with a row, a hub's file, and a run folder."""
    (tmp_path / "site.toml").write_text(SITE)
    (tmp_path / "hub.toml").write_text(HUB)
    (tmp_path / "rows.jsonl").write_text('{"instruction": "a", "output": "b"}\n')
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "of-mine.txt").write_text("x")
    return tmp_path


@pytest.mark.slow
def test_help_plans_and_checks_load_no_torch(folder: Path) -> None:
    found = shown(
        folder,
        "--version",
        "--help",
        "run --help",
        "site check site.toml",
        "hub check hub.toml",
        "plan --json",
        "plan",
        "watch .",
    )
    assert found[0] == (0, "fedflame 0.1.0")
    assert [code for code, _ in found] == [0, 0, 0, 1, 1, 0, 0, 0]
    assert found[3][1].startswith("BAD  no trainer at ") and found[4][1].startswith("BAD  ")


@pytest.mark.slow
def test_refusals_that_need_no_weights_load_no_torch(folder: Path) -> None:
    refusals = {
        "run --set sed=1": "config: unknown key 'sed'; the nearest valid key is 'seed'",
        "run --set clients.active_experts=9": f"active_experts 9: must be between 1 and 8 {FULL}",
        "run --set strategy.name=fedavg --set strategy.active_experts=9": (
            f"strategy.active_experts 9: must be 'min', 'full' or between 1 and 8 {FULL}"
        ),
        "run --set evaluation.max_new_tokens=256": (
            "evaluation.max_new_tokens = 256: must be below the model's context of 256 tokens "
            "(max_position_embeddings), which prompt and answer share"
        ),
        "run --data none.jsonl": "data.dataset_name = 'none.jsonl': no such file",
        "run --data rows.jsonl": "rows.jsonl: 1 usable rows; too few to hold some out for evaluation",
        "run --model kept": "model kept: the folder has no config.json",
        "run --output-dir kept": ("kept: exists already; --resume goes on with it, --overwrite starts anew"),
        "run --output-dir kept --overwrite": (
            "kept: not a run folder (kept/config.json: No such file or directory); it is left as it is"
        ),
        "run --output-dir none --resume": (
            "none: not a run folder (none/config.json: No such file or directory); it is left as it is"
        ),
        "plan --set clients.active_experts=9": f"active_experts 9: must be between 1 and 8 {FULL}",
        "evaluate olmoe-tiny --active-experts 9": f"active_experts 9: must be between 1 and 8 {FULL}",
        "evaluate olmoe-tiny --active-experts x": (
            "--active-experts 'x': must be integers of at least 1, such as [8, 4, 2, 1] or \"8,4,2,1\""
        ),
        "export none --to out": "none: not a run folder (none/config.json: No such file or directory); "
        "it is left as it is",
        "report none": "none: does not exist; a report needs a run folder, which holds a config.json",
        "watch kept": "kept: neither a run folder, which holds a config.json, nor one with a site.toml",
        "compare none.toml": "config file none.toml: No such file or directory",
        "trainer --site none.toml": "site file none.toml: No such file or directory",
    }
    found = shown(folder, *refusals)
    assert found == [(2, f"fedflame: {line}") for line in refusals.values()]


def test_a_wrong_k_of_a_wide_model_is_refused_before_the_machine_is_probed(
    folder: Path, tmp_path: Path
) -> None:
    model = Path(__file__).parents[2] / "configs" / "models" / "OLMoE-1B-7B-0924"
    found = shown(folder, f"plan --model {model} --set clients.active_experts=9")
    assert found == [(2, f"fedflame: active_experts 9: must be between 1 and 8 {FULL}")]
