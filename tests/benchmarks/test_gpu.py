"""benchmarks/gpu on a CPU: every stage finds what it is for, and README.md says what was found."""

from __future__ import annotations

import importlib
import json
import pickle
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks" / "gpu"
STAGES = ("ceilings", "correctness", "products", "block", "step", "parts", "losses")


def run(*options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(FOLDER / "run.py"), *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def _modules() -> Iterator[None]:
    """The modules of the folder can be imported, and are gone afterwards."""
    before = set(sys.modules)
    sys.path.insert(0, str(FOLDER))
    yield
    sys.path.remove(str(FOLDER))
    for name in set(sys.modules) - before:
        if (getattr(sys.modules[name], "__file__", None) or "").startswith(str(FOLDER)):
            del sys.modules[name]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_small_run_finds_something_in_every_stage(tmp_path: Path) -> None:
    done = run("--small", "--output", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["cpu.json"]
    results = json.loads((tmp_path / "cpu.json").read_text())
    assert list(results) == ["device", *STAGES]
    assert [failure for found in results.values() for failure in found["failures"]] == []
    tables = {name: found["tables"] for name, found in results.items()}
    (ceilings,) = tables["ceilings"]["ceilings"]
    assert ceilings["product_flops"] > 1e6 and ceilings["copy_bytes_per_second"] > 1e6
    assert_correct(tables["correctness"])
    assert_timed(tables)
    assert_losses(tables["losses"])
    assert run("--output", tmp_path, "--render", tmp_path / "README.md").returncode == 0
    assert_shown((tmp_path / "README.md").read_text(), tables)


Tables = dict[str, list[dict[str, Any]]]


def assert_correct(tables: Tables) -> None:
    assert all(row["error"] <= row["allowed"] for row in tables["checks"])
    errors = {row["check"]: row["error"] for row in tables["checks"]}
    for dtype, k in (("bfloat16", 8), ("bfloat16", 1), ("float32", 8), ("float16", 1)):
        (worst,) = [e for name, e in errors.items() if f"eager experts, {dtype}, k = {k}: worst" in name]
        assert worst > 0, "rounding differs from a loop in float64"
    assert sum("captured steps" in name for name in errors) == 3
    assert errors["clipped rows: the norm of the sum, at most"] > 0
    assert len(tables["waits"]) == 12


def assert_timed(tables: dict[str, Tables]) -> None:
    products, blocks, steps = tables["products"]["products"], tables["block"]["block"], tables["step"]["step"]
    assert len(products) == 26 and {row["active_experts"] for row in products} == {8, 1}
    launched = ("ours", "composed", "peft", "frozen")
    methods = ("ours-eager", *launched, *(f"{method}-captured" for method in launched))
    found = {(row["method"], row["active_experts"]) for row in blocks}
    assert found == {(method, k) for method in methods for k in (8, 4, 2, 1)}
    settings = ("active_experts", "gradient_checkpointing", "launched")
    captured = [(k, kept, "captured") for k in (8, 4, 2, 1) for kept in ("none", "experts")]
    otherwise = [(k, "none", launched) for k in (8, 1) for launched in ("compiled", "eager")]
    wanted = sorted([*captured, *otherwise])
    assert sorted(tuple(row[name] for name in settings) for row in steps) == wanted
    assert all(row["seconds"] > 0 and row["of_ceiling"] > 0 for row in (*products, *blocks, *steps))
    assert all(row["peak_bytes"] > 0 and row["launches"] > 0 for row in steps)
    for k in (8, 1):
        kernels = [row["seconds"] for row in tables["step"]["kernels"] if row["active_experts"] == k]
        assert len(kernels) == 60 and kernels == sorted(kernels, reverse=True)
    parts = " ".join(row["part"] for row in tables["parts"]["parts"])
    assert all(part in parts for part in ("AdamW", "head", "sorting", "products"))


def assert_losses(tables: Tables) -> None:
    assert all(row["cpu"] == row["card"] and row["cpu"][1] < row["cpu"][0] for row in tables["losses"])
    assert all(row["cpu"]["loss"] == row["card"]["loss"] for row in tables["runs"])
    assert {row["cpu"]["event"] for row in tables["runs"]} == {"client", "evaluation"}


def assert_shown(text: str, tables: dict[str, Tables]) -> None:
    assert text.count("\n### ") == 17 and "Nothing has been measured" not in text
    assert f"{tables['step']['step'][0]['seconds'] * 1e3:.4g}" in text
    assert "| waits per step, the most of all steps | 0 | <= 0 | met |" in text


@pytest.mark.slow
@pytest.mark.usefixtures("_modules")
def test_without_a_card_nothing_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a card")
    measure, stages = importlib.import_module("run").measure, importlib.import_module("stages")
    assert pickle.dumps((stages._run, importlib.import_module("sizes").FULL)), "as spawned processes need it"
    monkeypatch.setitem(stages.START, "cuda", "fork")  # so that nothing is imported again for this refusal
    with pytest.raises(SystemExit, match="nothing is measured; --small runs on a CPU"):
        measure("cuda", small=False, data=None, output=tmp_path, names="ceilings")
    found = capsys.readouterr().out
    assert "has no CUDA" in found or "finds no" in found


@pytest.mark.usefixtures("_modules")
def test_the_committed_readme_is_that_of_the_results() -> None:
    report = importlib.import_module("report")
    assert (FOLDER / "README.md").read_text() == report.readme(FOLDER / "results")


def measured(gpu: str, **steps: float) -> dict[str, Any]:
    """Results of steps of 8k tokens without checkpointing: seconds at k = 8 and 1, and the share at k = 8."""
    same = {"tokens": 8192, "gradient_checkpointing": "none", "launched": "captured"}
    rows = [
        {**same, "active_experts": 8, "seconds": steps["full"], "of_ceiling": steps["share"], "waits": {}},
        {**same, "active_experts": 1, "seconds": steps["one"], "of_ceiling": 0.1, "waits": {"here": 3}},
    ]
    return {"device": {"tables": {"device": [{"gpu": gpu}]}}, "step": {"tables": {"step": rows}}}


@pytest.mark.usefixtures("_modules")
def test_goals_are_met_or_missed_by_the_bar_of_the_card() -> None:
    goals = importlib.import_module("goals")
    h100, h200 = (
        goals.goals_table(measured(gpu, full=0.1, one=0.06, share=0.47)).splitlines()
        for gpu in ("NVIDIA H100 80GB HBM3", "NVIDIA H200")
    )
    assert h100[2].endswith("| 47.0% | >= 43.0% | met |")
    assert h200[2].endswith("| 47.0% | >= 50.0% | **missed** |")
    assert h200[3].endswith("| 0.60 | <= 0.50 | **missed** |")
    assert h200[4].endswith("|  | <= 0.50 | not measured |")
    assert "| waits per step, the most of all steps | 3 | <= 0 | **missed** |" in h200


@pytest.mark.usefixtures("_modules")
def test_the_places_that_wait_are_counted() -> None:
    waits = importlib.import_module("waits")

    def waiting() -> None:
        warnings.warn("called a synchronizing CUDA operation", UserWarning, stacklevel=1)

    def step() -> None:
        for _ in range(2):
            waiting()
        warnings.warn("something else", UserWarning, stacklevel=1)

    ((place, count),) = waits.warned(step).items()
    assert count == 2
    assert place.split(" < ")[0].endswith(" waiting") and place.split(" < ")[1].endswith(" step")


@pytest.mark.usefixtures("_modules")
def test_overlapping_kernels_are_counted_once() -> None:
    covered = importlib.import_module("kernels").covered
    assert covered([(5, 9), (0, 2), (1, 4), (6, 7)]) == 4 + 4


@pytest.mark.usefixtures("_modules")
def test_what_fails_is_recorded_and_what_follows_runs(tmp_path: Path) -> None:
    findings = importlib.import_module("findings").Findings(tmp_path / "stage.json")
    findings.add("table", value=1)
    with findings.attempt("a division"):
        _ = 1 / 0
    findings.add("table", value=2)
    found = json.loads((tmp_path / "stage.json").read_text())
    assert found["tables"] == {"table": [{"value": 1}, {"value": 2}]}
    (failure,) = found["failures"]
    assert (failure["what"], failure["message"]) == ("a division", "ZeroDivisionError: division by zero")
    assert "_ = 1 / 0" in failure["traceback"]
