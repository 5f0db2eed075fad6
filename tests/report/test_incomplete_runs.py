"""Reports of runs that lack something, were stopped or damaged: shown, or refused in one line."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from tests.report.synthetic import (
    append,
    client_round,
    evaluation,
    part,
    report,
    rows,
    synthetic_events,
    write_run,
)

from fedflame.config.run_config import RunConfig
from fedflame.errors import UserError
from fedflame.report import write_report
from fedflame.report.numbers import MISSING
from fedflame.run_files import ADVICE


def test_a_run_whose_updates_were_not_measured_has_a_report(tmp_path: Path) -> None:
    events = synthetic_events()
    for event in events:
        for name in ("norms", "pace"):
            event.pop(name, None)
    assert "No update is measured yet." in report(write_run(tmp_path / "run", events))


def test_run_without_scores(tmp_path: Path) -> None:
    events = [event | {"exact_match": None} for event in synthetic_events() if event["event"] == "evaluation"]
    html = report(write_run(tmp_path / "run", events))
    assert "no scores by generation" in html
    assert part(html, "Over rounds").count("<polyline") == 4


def test_truncated_last_line_is_ignored(run: Path) -> None:
    whole = report(run)
    append(run, client_round(3, 0) | {"bytes_up": 9_000_000})
    other, path = report(run), run / "metrics.jsonl"
    assert other != whole
    lines = path.read_bytes()
    for cut in (1, 2, 30, 100):
        path.write_bytes(lines[:-cut])
        assert report(run) == whole


def test_damaged_line_in_the_middle_is_named(run: Path) -> None:
    append(run, {"event": "client"})
    lines = len((run / "metrics.jsonl").read_text().splitlines())
    with pytest.raises(UserError, match=rf"line {lines}: not an event"):
        write_report(run)


def test_round_logged_twice_counts_once(run: Path) -> None:
    whole = report(run)
    append(run, client_round(3, 3))
    assert report(run) == whole


def test_run_stopped_before_its_first_round(tmp_path: Path) -> None:
    html = report(write_run(tmp_path / "run", [evaluation(0, 8, None, 3.25, 0.05)]))
    assert f"0 of {RunConfig().server.num_server_rounds} finished" in html
    assert rows(part(html, "Results by tier"))[1][2] == f"3.25 → {MISSING}"
    assert "No round has begun" in html


def test_client_that_was_never_sampled(tmp_path: Path) -> None:
    events = [event for event in synthetic_events() if event.get("client") != 3]
    html = report(write_run(tmp_path / "run", events))
    assert "Has not trained" in part(html, "Expert activation")
    assert rows(part(html, "Cost by client"))[4] == ["Client 3", "1", "0", *[MISSING] * 7]
    assert rows(part(html, "Results by tier"))[4][6:9] == ["0", "0 B", "0 B"]


@pytest.mark.parametrize("name", ["metrics.jsonl", "partition.json", "plan.json", "environment.json"])
def test_a_missing_file_is_named(run: Path, name: str) -> None:
    (run / name).unlink()
    with pytest.raises(UserError) as refused:
        write_report(run)
    assert str(refused.value) == f"{run / name}: No such file or directory; {ADVICE}"


def test_values_that_are_not_finite(tmp_path: Path) -> None:
    events = [evaluation(0, 8, None, 3.0, 0.1), evaluation(1, 8, None, 2.5, 0.2)]
    events += [evaluation(2, 8, None, math.nan, math.inf), evaluation(2, 8, "a", -math.inf, 0.5)]
    run = write_run(tmp_path / "run", events)
    html = report(run)
    assert rows(part(html, "Results by tier"))[1][2:4] == ["3.00 → not finite", "10.0 % → not finite"]
    assert "not finite" in part(html, "By category")
    assert "nan" not in part(html, "Over rounds") and "inf" not in part(html, "Over rounds")


def test_a_small_device_whose_result_is_not_finite(tmp_path: Path) -> None:
    lines = [evaluation(0, 8, None, 3.0, 0.1)]
    for at, loss in ((0, 3.0), (1, 2.0), (2, math.nan)):
        lines.append({"event": "deployment", "rank": 2, **evaluation(at, 8, None, loss, None)})
        lines[-1]["event"] = "deployment"
    html = report(write_run(tmp_path / "run", lines))
    assert rows(part(html, "What small devices deploy"))[1][2] == "3.00 → not finite"


def test_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json is missing"):
        write_report(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        write_report(tmp_path / "nowhere")
    # A model folder has a config.json too.
    (tmp_path / "config.json").write_text('{"model_type": "olmoe"}')
    with pytest.raises(UserError, match="no section strategy and no server"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()
