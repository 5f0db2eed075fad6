"""The live page of a run: what it says at each moment, and that no moment is too early for it."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.tiny_runs import events

from fedflame.errors import UserError
from fedflame.folder_lock import sole_user
from fedflame.report.live import live_page
from fedflame.run_files.checkpoints import checkpoint_path, kept_rounds
from fedflame.run_files.lines import line_of, read_lines

ALL_KEPT = "server.save_total_limit=9"
"""All checkpoints of the tiny run are kept: before round 1, and after each of three."""


@pytest.fixture
def run(undisturbed: Callable[..., Path], tmp_path: Path) -> Path:
    return shutil.copytree(undisturbed(ALL_KEPT), tmp_path / "run")


def cut(run: Path, upto: Callable[[dict[str, Any]], bool]) -> None:
    """Take the run back to just after the first event that is so, and to the checkpoints of before it."""
    lines, before = list[bytes](), ""
    for event in read_lines(run / "metrics.jsonl"):
        line, before = line_of(event, before)
        lines.append(line)
        if upto(event):
            break
    for kept in kept_rounds(run):
        if kept >= max(1, event["round"]):
            checkpoint_path(run, kept).unlink()
    (run / "metrics.jsonl").write_bytes(b"".join(lines))


def now(run: Path) -> str:
    """The text of the section that says what happens now."""
    section = re.search(r"<section><h2>Now</h2>(.*?)</section>", live_page(run)(), re.DOTALL)
    assert section
    return " ".join(re.sub(r"<[^>]*>", " ", re.sub(r"<title>.*?</title>", "", section[1])).split())


@pytest.mark.slow
def test_a_finished_run_has_its_report_below(run: Path) -> None:
    assert now(run) == "Finished. All 3 rounds are done."
    titles = re.findall(r"<h2>(.*?)</h2>", live_page(run)())
    assert titles == ["Now", *re.findall(r"<h2>(.*?)</h2>", (run / "report.html").read_text())]


def test_in_a_round_it_counts_who_has_answered(run: Path) -> None:
    cut(run, lambda event: event["event"] == "client" and (event["round"], event["client"]) == (2, 1))
    seconds = events(run, "round")[0]["seconds"]
    pace = f"The clients of a round take {seconds:.1f} s; 2 rounds to go: about {2 * seconds:.1f} s."
    asleep = "No process writes this run now."
    hint = "fedflame run --resume goes on after round 1."
    assert now(run) == f"{asleep} Round 2 of 3: 2 of 3 clients answered. {pace} {hint}"
    with sole_user(run / ".lock", ""):
        assert f"process {os.getpid()} on " in now(run)
        assert now(run).endswith(f"Round 2 of 3: 2 of 3 clients answered. {pace}")


def test_after_its_clients_the_round_is_scored(run: Path) -> None:
    cut(run, lambda event: event["event"] == "evaluation" and event["round"] == 3)
    text = "Round 3 of 3: 3 of 3 clients answered. The new model is scored on held-out rows: 1 tier done."
    assert text in now(run)


def test_before_round_1_it_waits(run: Path) -> None:
    cut(run, lambda event: event["event"] == "evaluation" and event["active_experts"] == 2)
    checkpoint_path(run, 0).unlink()
    text = "Waiting for round 1. The model before training is scored on held-out rows: 2 tiers done."
    assert text in now(run)
    for path in run.iterdir():
        if path.name != "plan.json":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    with sole_user(run / ".lock", ""):
        assert now(run).startswith("Waiting for round 1. The run loads its model")


def test_a_change_shows_and_no_change_makes_no_page_anew(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = live_page(run)
    first = page()
    assert page() is first
    checkpoint_path(run, 3).unlink()
    assert page() != first


def test_a_run_folder_at_any_moment_of_its_writing_is_a_page(run: Path, tmp_path: Path) -> None:
    page = live_page(run)
    for path in [path for path in run.rglob("*") if path.is_file()]:
        content = path.read_bytes()
        for size in (0, 1, len(content) // 2, len(content) - 1):
            path.write_bytes(content[:size])
            assert "<h2>Now</h2>" in page() and "Traceback" not in page(), (path, size)
        path.unlink()
        assert "<h2>Now</h2>" in page(), path
        path.write_bytes(content)
    assert "Finished." in page()
    shutil.rmtree(run)
    assert "Waiting for round 1." in page()


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place, reason in (
        ("none", "does not exist; watch needs a run folder, or the file or folder of a site"),
        ("file", "is a file; watch needs a run folder, or the file or folder of a site"),
        ("", "neither a run folder, which holds a config.json, nor one with a site.toml"),
    ):
        with pytest.raises(UserError) as refused:
            live_page(tmp_path / place)
        assert str(refused.value) == f"{tmp_path / place}: {reason}"
