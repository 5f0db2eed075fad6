"""What a run shows of scores at the clients: by hand, in the report, the API and to trackers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.report.synthetic import evaluation, part, report, rows, synthetic_events, write_run
from tests.tiny_runs import ANSWERS, tiny_run

from fedflame import Run
from fedflame.checked_json import read_checked, write_checked
from fedflame.report.numbers import MISSING
from fedflame.run_files import ADVICE
from fedflame.trackers.metrics import round_metrics


def told(
    at: int, client: int, k: int, loss: float, score: float | None = None, rank: int = 8
) -> dict[str, Any]:
    return {
        "event": "client_evaluation", "round": at, "client": client, "active_experts": k, "rank": rank,
        "loss_sum": loss * 10, "exact_matches": None, "rouge_l_sum": None, "loss": loss, "exact_match": score,
        "rouge_l": None, "rows": 1000 + client, "response_tokens": 10, "seconds": 1.0, "bytes_up": 400,
        "bytes_down": 4000,
    }  # fmt: skip


def summed(
    at: int, k: int | None, clients: int, loss: float, score: float | None = None, rank: int | None = 8
) -> dict[str, Any]:
    return {
        "event": "federated_evaluation", "round": at, "active_experts": k, "rank": rank if k else None,
        "clients": clients, "loss": loss, "exact_match": score, "rouge_l": None, "rows": 2001,
        "response_tokens": 20,
    }  # fmt: skip


EVENTS = [
    told(0, 0, 8, 3.0, 0.25), told(0, 1, 8, 5.0, 0.0),
    summed(0, 8, 2, 4.0, 0.125), summed(0, None, 2, 4.0, 0.125),
    told(3, 0, 8, 2.0), told(3, 1, 8, 2.5), told(3, 3, 1, 6.5, rank=2),
    summed(3, 8, 2, 2.25, 0.5), summed(3, 1, 1, 6.5, rank=2), summed(3, None, 3, 3.5),
    {"event": "evaluation_excluded", "round": 3, "client": 2, "active_experts": 2, "reason": "a <NaN>"},
]  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", [*synthetic_events(), *EVENTS])


def test_loss_by_tier_beside_the_hubs_and_by_client(run: Path) -> None:
    found = rows(part(report(run), "At the clients"))
    header, full, cut, client_header, north, south, west, excluded_header, excluded = found
    assert header == [
        "Tier",
        "Clients",
        "Rows",
        "Loss at the clients",
        "Loss at the hub",
        "Exact match at the clients",
    ]
    assert full == ["k = 8", "2", "2,001", "4.00 → 2.25", "3.25 → 1.75", "12.5 % → 50.0 %"]
    assert cut == [
        "k = 1, 2 ranks",
        "1",
        "2,001",
        f"{MISSING} → 6.50",
        f"{MISSING} → {MISSING}",
        f"{MISSING} → {MISSING}",
    ]
    assert client_header == ["Client", "k", "Rows", "Times asked", "Loss", "Exact match"]
    assert north == ["Client 0", "8", "1,000", "2", "3.00 → 2.00", f"25.0 % → {MISSING}"]
    assert south[:5] == ["Client 1", "8", "1,001", "2", "5.00 → 2.50"]
    assert west[:5] == ["Client 3", "1", "1,003", "1", f"{MISSING} → 6.50"]
    assert excluded_header[0] == "Round" and excluded == ["3", "Client 2", "a &lt;NaN&gt;"]


def test_where_the_best_rounds_are_used_the_figures_are_those_of_these_rounds(tmp_path: Path) -> None:
    """Of k = 8 the second of three, in which client 1 was not asked; of k = 1 the third."""
    second = [told(2, 0, 8, 1.5, 0.375), summed(2, 8, 1, 1.75, 0.25)]
    hub = [*synthetic_events(), evaluation(3, 8, None, 9.0, 0.5)]
    run = write_run(tmp_path / "run", [*hub, *EVENTS[:4], *second, *EVENTS[4:]])
    section = part(report(run), "At the clients")
    assert "Before training → after the last round measured." in section
    assert rows(section)[1][:4] == ["k = 8", "2", "2,001", "4.00 → 2.25"]
    config = read_checked(run / "config.json", ADVICE)
    config["server"]["load_best_model_at_end"] = True
    write_checked(run / "config.json", config)
    section = part(report(run), "At the clients")
    _, full, cut, _, north, south, west, *_ = rows(section)
    assert full == ["k = 8", "1", "2,001", "4.00 → 1.75", "3.25 → 2.25", "12.5 % → 25.0 %"]
    assert cut[3] == f"{MISSING} → 6.50"
    assert north == ["Client 0", "8", "1,000", "3", "3.00 → 1.50", "25.0 % → 37.5 %"]
    assert (
        south[:5] == ["Client 1", "8", "1,001", "2", f"5.00 → {MISSING}"] and west[4] == f"{MISSING} → 6.50"
    )
    assert "Before training → after the best round of each k, whose adapter is used." in section


def test_while_clients_score_there_is_no_sum_yet(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [*synthetic_events(), told(0, 0, 8, 3.0)])
    _, tier, _, client = rows(part(report(run), "At the clients"))
    assert tier[:4] == ["k = 8", MISSING, MISSING, f"{MISSING} → {MISSING}"]
    assert client[4] == f"3.00 → {MISSING}"


def test_the_curves_are_those_of_the_tiers_that_deploy_all_ranks(run: Path) -> None:
    section = part(report(run), "At the clients")
    assert section.count("<figure>") == 2
    assert "k = 8, round 3: Response loss at the clients 2.25" in section
    assert "k = 8, round 3: Response loss at the hub 1.75" in section
    assert "k = 1, round" not in section


def test_a_report_of_a_run_that_asks_nobody_has_no_such_section(tmp_path: Path) -> None:
    assert "At the clients" not in report(write_run(tmp_path / "run", synthetic_events()))


def test_a_report_where_every_answer_was_left_out_names_them(tmp_path: Path) -> None:
    page = report(write_run(tmp_path / "run", [*synthetic_events(), EVENTS[-1]]))
    assert "1 answer left out in all." in part(page, "At the clients")


def test_the_api_gives_what_clients_told_and_its_sums(run: Path) -> None:
    finished = Run(run)
    assert finished.client_scores[3][1] == {
        "active_experts": 8, "rank": 8, "rows": 1001, "response_tokens": 10, "loss": 2.5, "exact_match": None,
        "rouge_l": None,
    }  # fmt: skip
    assert finished.federated_scores[3].keys() == {(8, 8), (1, 2), None}
    assert finished.federated_scores[0][8, 8] == {
        "clients": 2, "rows": 2001, "response_tokens": 20, "loss": 4.0, "exact_match": 0.125, "rouge_l": None,
    }  # fmt: skip


def test_trackers_get_the_sums_of_the_tiers_and_nothing_of_one_client() -> None:
    of_round = [event for event in EVENTS if event["round"] == 3]
    assert round_metrics(of_round) == {
        "eval_clients/loss/k8_r8": 2.25,
        "eval_clients/exact_match/k8_r8": 0.5,
        "eval_clients/loss/k1_r2": 6.5,
        "eval_clients/loss/all": 3.5,
    }


def test_a_real_run_shows_it(tiny_folder: Path, tmp_path: Path) -> None:
    settings = ("server.fraction_evaluate=1", "evaluation.client_test_size=0.3", "server.num_server_rounds=1")
    tiny_run(tiny_folder, tmp_path / "run", *settings, ANSWERS)
    finished = Run(tmp_path / "run")
    assert finished.federated_scores.keys() == {0, 1} and finished.client_scores[1].keys() == {0, 1, 2}
    assert len(rows(part(finished.report.read_text(), "At the clients"))) == 1 + 3 + 1 + 3
