"""The report of a run, held to numbers worked out by hand from a small synthetic run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from tests.report.synthetic import client_round, evaluation, part, report, rows, synthetic_events, write_run

from fedflame.checked_json import read_checked, write_checked
from fedflame.config.run_config import RunConfig
from fedflame.report.markup import element
from fedflame.report.numbers import MISSING, duration, si
from fedflame.report.records import read_run


def test_headline_holds_the_numbers_of_the_events(run: Path) -> None:
    table = rows(part(report(run), "Results by tier"))
    assert table[0][3] == "Exact match"
    # k = 8: FLOPs 1 + 0.5 * 8; tokens 1000 + 2000 + 3000; 3 * 1.05 MB up, 3 * 2 MB down.
    expected = ["k = 8", "1", "3.25 → 1.75", "5.0 % → 65.0 %", "5 GFLOP", "100.0 %"]
    assert table[1] == [*expected, "6 k", "3.15 MB", "6 MB", "3 of 3"]
    # k = 2 lost round 2 to the exclusion.
    expected = ["k = 2", "1", "5.25 → 3.75", "3.0 % → 63.0 %", "2 GFLOP", "40.0 %"]
    assert table[3] == [*expected, "4 k", "2.1 MB", "4 MB", "3 of 3"]
    assert [row[0] for row in table[1:]] == ["k = 8", "k = 4", "k = 2", "k = 1"]


def test_text_is_escaped(run: Path) -> None:
    html = report(run)
    assert "<script" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert "update has a &lt;NaN&gt; in 0.A1" in html
    assert "a&lt;b" in html
    assert element("td", '"<', title='"<') == '<td title="&quot;&lt;">&quot;&lt;</td>'


def test_page_loads_nothing(run: Path) -> None:
    html = report(run)
    assert not re.search(r"https?:|\bsrc=|href=|url\(|@import|<link|<img|<iframe", html)
    assert sorted(path.name for path in run.iterdir() if "report" in path.name) == ["report.html"]


def test_categories_partition_cost_and_rounds(run: Path) -> None:
    html = report(run)
    by_category = rows(part(html, "By category"))
    assert by_category[1] == ["arithmetic", *["30.0 %"] * 4]
    assert by_category[4] == ["arithmetic", *["1.50"] * 4]
    bars = part(html, "Data of the clients")
    assert 'x="0.00%" width="33.33%"' in bars and 'x="33.33%" width="66.67%"' in bars
    assert "Client 3 <small>k = 1</small>" in bars
    # Client 2 trained in rounds 1 and 3: 4000 tokens in 8 s.
    cost = rows(part(html, "Cost by client"))
    assert cost[3] == ["Client 2", "2", "2", "10", "4 k", "8.0 s", "500", "3 GFLOP", "2.1 MB", "4 MB"]
    rounds = rows(part(html, "Rounds"))
    assert rounds[2] == ["2", "3", "30.0 s", "2.000", "Client 2 (k = 2): update has a &lt;NaN&gt; in 0.A1"]


def test_sizes_of_updates_are_the_largest_and_outliers_are_warned_of(run: Path) -> None:
    shown = part(report(run), "Size of updates")
    # Client 1 has paces 2.1, 2.2, 2.3; client 2 has 3.1 and 3.3.
    wanted = ["1.000", "2.000", "3.000", "4.000", "0.500", "0.250"]
    assert rows(shown)[2] == ["Client 1", "4", "3.000", *wanted[1:], "2.20", "2.30", "1 of 3"]
    assert rows(shown)[3] == ["Client 2", "2", "3.000", *wanted[1:], "3.20", "3.30", "0 of 2"]
    assert shown.count("Warning") == 1
    assert "Warning: Client 1 went 3.2 times as far as the median client of round 3" in shown
    assert "(over 3 times is an outlier)" in shown


@pytest.mark.parametrize(
    ("counted", "mean"),
    [("held", (30 * 1.1 + 90 * 1.3) / 120), ("trained", (20 * 1.1 + 5 * 1.3) / 25)],
)
def test_rescaler_is_the_mean_of_a_tier_weighted_by_the_rows_that_count(
    tmp_path: Path, counted: str, mean: float
) -> None:
    rows = {"num_examples": 90, "trained_examples": 5}
    folder = write_run(
        tmp_path / "run", [client_round(1, 1), client_round(1, 3) | {"active_experts": 4} | rows]
    )
    config = read_checked(folder / "config.json", "")
    config["strategy"]["counted_rows"] = counted
    write_checked(folder / "config.json", config)
    assert f"k = 4, layer 1: {mean:.3f}" in part(report(folder), "Rescaler")


def test_flat_rescaler_is_one_sentence(tmp_path: Path) -> None:
    html = report(write_run(tmp_path / "run", [client_round(1, 0)]))
    assert "It is 1 on every tier and layer" in part(html, "Rescaler")


def test_rouge_is_shown_where_there_is_no_exact_match(tmp_path: Path) -> None:
    pairs = [(0, 0.1), (1, 0.4321)]
    events = [evaluation(at, 8, None, 2.0, None) | {"rouge_l": value} for at, value in pairs]
    table = rows(part(report(write_run(tmp_path / "run", events)), "Results by tier"))
    assert table[0][3] == "ROUGE-L" and table[1][3] == "0.100 → 0.432"


def test_more_categories_than_colours_fold_into_other(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [])
    partition = read_checked(run / "partition.json", "")
    partition["categories"] = [f"c{i}" for i in range(12)]
    partition["clients"] = [
        {"client": 0, "active_experts": 8, "rows": 78, "per_category": {f"c{i}": i + 1 for i in range(12)}}
    ]
    write_checked(run / "partition.json", partition)
    bars = part(report(run), "Data of the clients")
    # The three smallest categories have 1 + 2 + 3 rows.
    assert "other: 6" in bars and "c11: 12" in bars and "c0:" not in bars


def test_numbers_are_humane() -> None:
    assert [si(12_345_678), si(4.5e9, "FLOP"), si(2_100_000, "B")] == ["12.3 M", "4.5 GFLOP", "2.1 MB"]
    assert [si(0), si(300), si(999_600), si(None), si(123_400)] == ["0", "300", "1 M", MISSING, "123 k"]
    assert [duration(6.5), duration(245), duration(7380)] == ["6.5 s", "4 min 05 s", "2 h 03 min"]


@pytest.mark.parametrize(("strategy", "wanted"), [("flame", 4), ("fedavg", 1)])
def test_a_client_that_takes_turns_is_of_the_k_that_it_affords(
    strategy: str, wanted: int, tmp_path: Path
) -> None:
    """Client 1 affords k = 4 and trains with k = 1 last; where a method overrules budgets, that is its k."""
    events = [*synthetic_events(), client_round(4, 1) | {"active_experts": 1}]
    run = write_run(tmp_path / "run", events)
    write_strategy(run, name=strategy)
    assert read_run(run).clients() == {0: 8, 1: wanted, 2: 2, 3: 1}
    assert rows(part(report(run), "Cost by client"))[2][:2] == ["Client 1", str(wanted)]


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        ({"name": "flame"}, "flame"),
        (
            {"name": "flame", "temperature": 2.0, "k_rotation": "none"},
            "flame, temperature 2.0, k rotation none",
        ),
        ({"name": "flexlora", "temperature": 2.0}, "flexlora"),
    ],
)
def test_the_header_names_the_options_that_are_not_at_their_defaults(
    options: dict[str, Any], shown: str, run: Path
) -> None:
    write_strategy(run, **options)
    assert f"<dt>Strategy</dt><dd>{shown}</dd>" in report(run)


def write_strategy(run: Path, **options: Any) -> None:
    config = RunConfig().model_dump()
    config["strategy"] |= options
    write_checked(run / "config.json", config)
