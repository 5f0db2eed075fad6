"""A run whose clients are files: what a user sees of their names, and a client that owns no row."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.json_lines import write_lines
from tests.tiny_runs import ANSWERS, SETTINGS, events, invoke, set_options

SILOS = tuple(setting for setting in SETTINGS if not setting.startswith(("clients.", "data.max_rows")))


def test_clients_have_the_names_of_their_files_and_one_without_rows_takes_no_part(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, count in (("[red]north", 9), ("south", 0), ("west", 14)):
        rows = [{"instruction": f"{name} {number}", "output": "yes"} for number in range(count)]
        write_lines(Path(f"{name}.jsonl"), rows)
    Path("test").mkdir()
    Path("test/rows.jsonl").write_text('{"instruction": "test", "output": "no"}\n', encoding="utf-8")
    given = (
        "data.client_files=*.jsonl",
        "evaluation.dataset_name=test/rows.jsonl",
        "clients.active_experts=4,2,1",
        "server.num_server_rounds=2",
        "server.min_clients=2",
        ANSWERS,
    )
    sets = set_options(*SILOS, *given)
    result = invoke("run", "--model", tiny_folder, "--output-dir", "run", *sets)
    assert result.exit_code == 0, result.output
    assert "round 1: [red]north (k=4) loss" in result.output and "round 2: west (k=" in result.output
    assert "client 0" not in result.output
    assert {(one["round"], one["client"]) for one in events(Path("run"), "client")} == {
        (1, 0), (1, 2), (2, 0), (2, 2),
    }  # fmt: skip
    partition = json.loads(Path("run/partition.json").read_text(encoding="utf-8"))
    assert [(one["name"], one["rows"]) for one in partition["clients"]] == [
        ("[red]north", 9), ("south", 0), ("west", 14),
    ]  # fmt: skip
    report = Path("run/report.html").read_text(encoding="utf-8")
    assert "[red]north" in report and "Client 0" not in report
    Path("east.jsonl").write_text('{"instruction": "new", "output": "one"}\n', encoding="utf-8")
    refused = invoke("run", "--model", tiny_folder, "--output-dir", "run", "--resume", *sets)
    assert refused.exit_code == 2
    assert "clients.num_clients differs" in refused.output.replace("\n", " ")
