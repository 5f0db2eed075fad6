"""What a trainer notes of its answers, and the page that a site's administrator sees of it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from tests.engines_here import write_site
from tests.trainer_asked import MODEL, RUN, request

from fedflame.folder_lock import sole_user
from fedflame.messages import RoundPlan
from fedflame.report.numbers import MISSING
from fedflame.trainer import journal as journal_module
from fedflame.trainer.job import TrainingJob
from fedflame.trainer.journal import FILE_NAME, Answered, Journal, read_journal
from fedflame.trainer.ledger import Round
from fedflame.trainer.page import live_site_page, site_page
from fedflame.trainer.service import TrainerService

OTHER = "cd" * 16


def rows_of(page: str, title: str) -> list[list[str]]:
    """The cells of a section's table, as text."""
    section = re.search(rf"<section><h2>{title}</h2>(.*?)</section>", page, re.DOTALL)
    assert section
    cells = r"<t[hd][^>]*>(.*?)</t[hd]>"
    rows = re.findall(r"<tr>(.*?)</tr>", section[1])
    return [[re.sub(r"<[^>]*>", "", cell) for cell in re.findall(cells, row)] for row in rows]


def test_updates_refusals_and_failures_are_noted_once_each(
    make_service: Callable[..., TrainerService],
    job: TrainingJob,
    plan: RoundPlan,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    service = make_service("[limits]\nmax_steps = 3\n")
    trained = service.answer(request(job, plan))
    service.answer(request(job, plan))  # answered again
    service.answer(request(job, replace(plan, max_steps=4), run=OTHER))
    service.answer(request(job, plan, run="no run"))
    service.answer(request(job, plan, addition=True, run=OTHER))  # it lacks what this adds to
    monkeypatch.setattr(service._work, "train", lambda *given: 1 / 0)
    service.answer(request(job, replace(plan, round=3)))
    update, refused, unnamed, failed = read_journal(tmp_path / "state")
    told = trained.header
    assert (update.kind, update.run, update.round, update.active_experts) == ("update", RUN, 2, 2)
    assert (update.steps, update.tokens, update.reason) == (told["steps"], told["tokens"], "")
    assert 0 < update.seconds < 60
    assert (refused.kind, refused.run, unnamed.kind, unnamed.run) == ("refused", OTHER, "refused", "")
    assert refused.reason == "the plan asks for steps = 4; this site allows at most 3"
    assert (failed.kind, failed.run) == ("failed", RUN) and "division by zero" in failed.reason


def test_a_journal_that_cannot_be_written_disturbs_no_training(
    make_service: Callable[..., TrainerService], job: TrainingJob, plan: RoundPlan, tmp_path: Path
) -> None:
    (tmp_path / "state" / FILE_NAME).mkdir(parents=True)
    assert make_service().answer(request(job, plan)).header["kind"] == "update"
    assert read_journal(tmp_path / "state") == []


def test_it_stays_small_and_keeps_the_latest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_module, "LONGEST", 4000)
    journal = Journal(tmp_path)
    for number in range(100):
        journal.refusal("refused", RUN, f"reason {number}")
        assert (tmp_path / FILE_NAME).stat().st_size <= 4000
    found = [int(answer.reason.removeprefix("reason ")) for answer in read_journal(tmp_path)]
    assert found == list(range(found[0], 100)) and len(found) > 5


GOOD = Answered(1.0e9, "update", RUN, 1, 2, 3, 4, 5.0)


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "other"},
        {"time": 1},
        {"time": -1.0},
        {"time": 1e12},
        {"round": "1"},
        {"more": 1},
        {"seconds": None},
    ],
)
def test_a_line_that_is_damaged_is_passed_over(change: dict[str, object], tmp_path: Path) -> None:
    lines = [
        json.dumps(asdict(GOOD)),
        json.dumps(asdict(GOOD) | change),
        "{",
        "[1]",
        "\udcff",
        json.dumps(asdict(GOOD)),
    ]
    (tmp_path / FILE_NAME).write_bytes("\n".join(lines).encode(errors="surrogateescape") + b'\n{"time": 1')
    assert read_journal(tmp_path) == [GOOD, GOOD]


def test_the_page_by_hand(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noon = 1_800_000_000.0
    site = write_site(tmp_path, "north", data, 2, {MODEL: MODEL})
    text = site.read_text() + "[limits]\nmax_runs = 5\nmax_rounds_per_day = 3\nmax_update_norm = 2.5\n"
    site.write_text(text)
    state = tmp_path / "state"
    state.mkdir()
    day = 86_400
    begun = [Round(RUN, "p1", noon - 2 * day), Round(RUN, "p2", noon - 60), Round(OTHER, "p3", noon - 30)]
    begun.insert(2, Round(RUN, "s2", noon - 45, "evaluate"))
    (state / "ledger.jsonl").write_text("".join(json.dumps(asdict(one)) + "\n" for one in begun))
    bad = "the plan asks for <b>steps</b>"
    answers = [
        Answered(noon - 2 * day + 9, "update", RUN, 1, 2, 40, 1000, 10.0),
        Answered(noon - 50, "update", RUN, 2, 1, 60, 3000, 5.0),
        Answered(noon - 44, "evaluation", RUN, 2, 2, 0, 9000, 1.0),
        Answered(noon - 40, "refused", OTHER, reason=bad),
    ]
    (state / FILE_NAME).write_text("".join(json.dumps(asdict(one)) + "\n" for one in answers))
    monkeypatch.setattr("fedflame.trainer.page.time.time", lambda: noon)
    page = site_page(site)
    _, other, run = rows_of(page, "Runs")
    assert [row[:9] for row in (other, run)] == [
        ["cdcdcdcd", "1", "0", MISSING, MISSING, "0", "0.0 s", "0", "1"],
        ["abababab", "2", "2", "2", "2, 1", "4 k", "15.0 s", "1", "0"],
    ]
    limits = {row[0]: row[1:] for row in rows_of(page, "Limits")}
    assert limits["max_runs"] == ["5", "2", "3"] and limits["max_rounds_per_day"] == ["3", "2", "1"]
    assert limits["max_steps"] == ["10,000", "60", MISSING] and limits["max_tokens"][1] == "3,000"
    assert limits["max_seconds_per_round"] == ["no limit", "10", MISSING]
    assert limits["max_update_norm"] == ["2.5", MISSING, MISSING] and limits["disclosure"] == [
        "exact",
        MISSING,
        MISSING,
    ]
    assert limits["max_memory"][0] == "as the machine has"
    _, *rounds = rows_of(page, "Last rounds")
    assert [row[1:] for row in rounds] == [
        ["abababab", "2", "1", "60", "3 k", "5.0 s", "600"],
        ["abababab", "1", "2", "40", "1 k", "10.0 s", "100"],
    ]
    _, refusal = rows_of(page, "Last refusals")
    assert refusal[1:] == ["cdcdcdcd", "refused", "the plan asks for &lt;b&gt;steps&lt;/b&gt;"]
    assert "The trainer does not run." in page and "It has no answer yet." in page
    with sole_user(state / "trainer.lock", ""):
        assert "The trainer runs." in site_page(site)


def test_the_page_of_a_site_that_nobody_has_asked_yet(tmp_path: Path, data: Path) -> None:
    page = site_page(write_site(tmp_path, "north", data, 2, {MODEL: MODEL}))
    for text in ("No round has begun yet.", "has taken part in no run", "Nothing has been refused"):
        assert text in page


def test_a_page_whose_site_is_changed_while_it_is_watched(tmp_path: Path, data: Path) -> None:
    site = write_site(tmp_path, "north", data, 2, {MODEL: MODEL})
    page = live_site_page(site)
    assert page() is page()
    site.write_text(site.read_text().replace("= 2", "= 1"))
    assert "<dd>1</dd>" in page()
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "ledger.jsonl").write_text("{}\n")
    assert "The site cannot be read: " in page() and "no record of a round" in page()
    site.write_text("[")
    assert "not TOML" in page()
