"""What a site's administrator sees of what private runs have spent."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.tiny_runs import invoke

from fedflame.privacy import accounting
from fedflame.privacy.accounting import Spending, epsilon_of
from fedflame.trainer.ledger import FILE_NAME, Round, begin_round
from fedflame.trainer.page import site_page
from fedflame.trainer.site import SiteLimits, load_site


@pytest.fixture
def site(tmp_path: Path) -> Path:
    (tmp_path / "rows.jsonl").write_text('{"instruction": "a", "response": "b"}\n')
    path = tmp_path / "site.toml"
    path.write_text('name = "north"\n[data]\ndataset_name = "rows.jsonl"\n[trainer]\nactive_experts = 2\n')
    return path


def trained(site: Path, *steps: int, run: str = "ab" * 16, data: str = "") -> None:
    for number, count in enumerate(steps):
        begun = Round(run, f"{number}", 1.76e9, "train", data or load_site(site).dataset, 0.1, 1.0, count)
        begin_round(site.parent / "state", begun, SiteLimits())


def shown(*command: str | Path) -> str:
    result = invoke(*command)
    assert result.exit_code == 0, result.stderr
    return result.stdout


def test_it_shows_runs_and_what_is_spent_and_left(site: Path) -> None:
    trained(site, 10, 20)
    trained(site, 5, run="cd" * 16)
    trained(site, 7, run="ef" * 16, data="/before/rows.jsonl")
    begin_round(site.parent / "state", Round("00" * 16, "p", 1.76e9), SiteLimits())
    site.write_text(site.read_text() + "[privacy]\nmax_epsilon = 6\n")
    text = shown("site", "privacy", site)
    of_run, whole = (epsilon_of([Spending(0.1, 1.0, steps)], 1e-5) for steps in (30, 35))
    assert all(word in text for word in ("abababab", "cdcdcdcd", f"{of_run:.3g}"))
    assert f"rows.jsonl: epsilon = {whole:.3g} of 6 spent (delta = 1e-05)" in text
    assert "/before/rows.jsonl: epsilon = " in text
    assert "1 round without noise: nothing bounds what was told" in text
    assert "plans without noise" not in text


def test_without_a_word_of_privacy_plans_without_noise_are_carried_out_and_it_says_so(site: Path) -> None:
    assert "plans without noise are carried out, too; privacy.require = true" in shown(
        "site", "privacy", site
    )


@pytest.mark.parametrize(
    ("person_field", "people", "bad"),
    [("", 2, 5), ('person_field = "who"', 2, 2), ('person_field = "who"', 5, 5), ("", 5, 5)],
)
def test_a_delta_that_no_private_plan_may_have_here_is_found(
    person_field: str, people: int, bad: int, site: Path
) -> None:
    rows = [{"instruction": "a", "response": "b", "who": f"{number % people}"} for number in range(5)]
    (site.parent / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    named = site.read_text().replace("[trainer]", f"{person_field}\n[trainer]")
    for delta, found in ((1 / bad, True), (0.99 / bad, False)):
        site.write_text(f"{named}[privacy]\nmax_epsilon = 9\ndelta = {delta}\n")
        text = " ".join(invoke("site", "check", site).stdout.split())
        assert (f"is no smaller than one over {bad} rows or persons" in text) == found


def test_before_any_private_round_nothing_is_spent(site: Path) -> None:
    site.write_text(site.read_text() + "[privacy]\nrequire = true\n")
    text = shown("site", "privacy", site)
    assert (
        "epsilon = 0 spent (delta = 1e-05); the site sets no limit" in text and "Private rounds" not in text
    )
    assert "privacy.require" not in text and not (site.parent / "state" / FILE_NAME).exists()


def test_a_check_says_what_is_left_and_when_nothing_is(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained(site, 30)
    assert "privacy:" not in invoke("site", "check", site).stdout
    file = site.read_text()
    for limit, word in (
        ("6", "ok   privacy: epsilon = 4.18 of 6"),
        ("4", "BAD  privacy: epsilon = 4.18 of 4"),
    ):
        site.write_text(f"{file}[privacy]\nmax_epsilon = {limit}\n")
        assert word in invoke("site", "check", site).stdout
    assert "no private run is carried out any more" in " ".join(invoke("site", "check", site).stdout.split())
    monkeypatch.setattr(accounting, "find_spec", lambda name: None)
    assert "install fedflame[privacy]" in " ".join(invoke("site", "check", site).stdout.split())


def test_a_damaged_ledger_is_one_line(site: Path) -> None:
    (site.parent / "state").mkdir()
    (site.parent / "state" / FILE_NAME).write_text("{\n")
    result = invoke("site", "privacy", site)
    assert result.exit_code == 2 and result.stderr.count("\n") == 1 and "line 1" in result.stderr


def test_the_page_of_the_site_says_it_too(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "<h2>Privacy</h2>" not in site_page(site)
    begin_round(site.parent / "state", Round("00" * 16, "p", 1.76e9), SiteLimits())
    trained(site, 30)
    page = site_page(site)
    assert "Of each row, epsilon = 4.18 spent (delta = 1e-05); the site sets no limit" in page
    assert "1 round had no noise" in page
    monkeypatch.setattr(accounting, "find_spec", lambda name: None)
    accounting._epsilon.cache_clear()
    assert "What was spent cannot be computed: " in site_page(site)
