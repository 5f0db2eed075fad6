"""Tables and page of a comparison, held to numbers worked out by hand."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path

from tests.compare.synthetic import ALL, a_cell, a_result, synthetic

from fedflame.compare.comparison import Comparison
from fedflame.compare.devices import Devices
from fedflame.compare.files import write_comparison
from fedflame.compare.grid import Grid
from fedflame.compare.page import page
from fedflame.compare.tables import (
    deployment_tables,
    device_table,
    difference_table,
    markdown,
    measures,
    summary_table,
    total_table,
)
from fedflame.report.numbers import MISSING


def texts(table: object) -> list[list[str]]:
    return [[entry.text for entry in row] for row in table.rows]  # type: ignore[attr-defined]


def test_the_summary_shows_mean_and_spread_and_marks_the_best() -> None:
    comparison = synthetic()
    loss, exact = measures(comparison, ())
    table = summary_table(comparison, (), loss)
    assert table.headers == ["method", "k = 4", "k = 1"]
    assert texts(table) == [
        ["before training", "4.300 ± 0.361", "5.300 ± 0.361"],
        ["all", "2.300 ± 0.361", "3.300 ± 0.361"],
        ["own", "1.300 ± 0.300", "2.300 ± 0.300"],
    ]
    assert [[entry.mood for entry in row[1:]] for row in table.rows] == [[""] * 2, [""] * 2, ["after"] * 2]
    assert table.title == "Response loss, mean ± standard deviation over 3 seeds"
    assert texts(summary_table(comparison, (), exact))[1] == ["all", "50.0 ± 0.0", "50.0 ± 0.0"]


def test_the_differences_say_what_they_mean() -> None:
    comparison = synthetic()
    loss, exact = measures(comparison, ())
    table = difference_table(comparison, (), loss)
    assert texts(table) == [["own", *["-1.000 better"] * 2]]
    assert (table.rows[0][1].mood, table.rows[0][1].detail) == ("better", "[-1.248, -0.752]")
    assert texts(difference_table(comparison, (), exact))[0][1] == "+0.0 no clear difference"


def test_what_devices_deploy_stands_with_its_cost_and_differences() -> None:
    comparison = synthetic()
    loss, exact = measures(comparison, ())
    values, differences = deployment_tables(comparison, (), loss)
    assert values.headers == differences.headers == ["method", "affords k = 4", "affords k = 1"]
    assert texts(values) == [
        ["all", "2.300 ± 0.361", "2.800 ± 0.361"],
        ["own", "1.300 ± 0.300", "2.300 ± 0.300"],
    ]
    assert [[entry.detail for entry in row[1:]] for row in values.rows] == [
        ["k = 4, r = 8: 100.0 %", "k = 4, r = 2: 95.0 %"],
        ["k = 4, r = 8: 100.0 %", "k = 1, r = 8: 25.0 %"],
    ]
    assert texts(differences) == [["own", "-1.000 better", "-0.500 better"]]
    assert differences.rows[0][2].detail == "[-0.748, -0.252]"
    values, _ = deployment_tables(comparison, (), exact)
    assert texts(values)[0] == ["all", "50.0 ± 0.0", MISSING]


def test_one_seed_has_no_interval() -> None:
    whole = synthetic()
    comparison = Comparison(whole.grid, {name: whole.results[name] for name in ("all-2", "own-2")}, {})
    loss = measures(comparison, ())[0]
    assert texts(difference_table(comparison, (), loss))[0][1] == "-1.100 one seed"
    assert texts(summary_table(comparison, (), loss))[2][1] == "1.600"
    assert summary_table(comparison, (), loss).title == "Response loss, one seed"


def test_a_seed_that_diverged_makes_the_mean_not_finite() -> None:
    whole = synthetic()
    diverged = {"own-2": a_result(a_cell("own", 2), math.nan, ALL)}
    comparison = Comparison(whole.grid, dict(whole.results) | diverged, {})
    loss = measures(comparison, ())[0]
    own = summary_table(comparison, (), loss).rows[2][1]
    assert (own.text, own.mood, own.detail) == ("not finite", "worse", "1 of 3 seeds")
    assert summary_table(comparison, (), loss).rows[1][1].mood == "after", "the best of what is finite"
    difference = difference_table(comparison, (), loss).rows[0][1]
    assert (difference.text, difference.mood, difference.detail) == ("not finite", "worse", "")
    deployed, paired = deployment_tables(comparison, (), loss)
    assert [row[1].text for row in (deployed.rows[1], paired.rows[0])] == ["not finite", "not finite"]
    assert "not finite" in page(comparison, "diverged")
    everyone = {cell.name: a_result(cell, math.nan, ALL) for cell in whole.grid.cells}
    assert page(Comparison(whole.grid, everyone, {}), "none").count("None.") == 8


def test_the_costs_by_method_and_by_device() -> None:
    comparison = synthetic()
    assert texts(total_table(comparison, ())) == [
        ["all", "400", "16 kFLOP", "120 B", "80 B", "13 min 40 s", "100.0 %"],
        ["own", "400", "10 kFLOP", "120 B", "80 B", "3 min 40 s", "26.8 %"],
    ]
    costs = texts(device_table(comparison, ()))
    assert costs[0][1:] == [
        "k = 4", "1", "k = 4", "200", "8 kFLOP", "60 B", "40 B", "3 min 40 s (27% of the run)",
    ]  # fmt: skip
    assert costs[1][-1] == "13 min 40 s (100% of the run)"


def test_sampled_clients_are_counted_in_the_mean() -> None:
    whole = synthetic()
    first = whole.results["own-0"]
    more = [*first.clients, *(replace(cost, client=cost.client + 2) for cost in first.clients)]
    results = dict(whole.results) | {"own-0": replace(first, clients=more)}
    costs = texts(device_table(Comparison(whole.grid, results, {}), ()))
    assert [row[2] for row in costs] == ["1", "1", "1.3", "1.3"]


def test_markdown_escapes_and_marks_the_best() -> None:
    comparison = synthetic()
    text = markdown([summary_table(comparison, (), measures(comparison, ())[0])])
    assert "| method | k = 4 | k = 1 |\n| --- | --- | --- |\n" in text
    assert "| own | **1.300 ± 0.300** | **2.300 ± 0.300** |" in text
    text = markdown([difference_table(comparison, (), measures(comparison, ())[0])])
    assert "| own | -1.000 better [-1.248, -0.752] |" in text


def test_the_page_loads_nothing_and_holds_tables_and_curves() -> None:
    html = page(synthetic(), "<some> & more")
    assert not re.search(r"https?:|\bsrc=|href=|url\(|@import|<script|<link|<img|<iframe", html)
    assert "&lt;some&gt; &amp; more" in html
    # Two tiers, four axes, two measures; two methods with a band each.
    assert html.count("<svg viewBox") == 16
    assert html.count("<polygon") == html.count("<polyline") == 32
    assert '<td class="better">-1.000 better<small>[-1.248, -0.752]</small></td>' in html
    assert "1.300 ± 0.300" in html and "3 min 40 s" in html


def test_curves_are_placed_by_what_was_spent() -> None:
    html = page(synthetic(), "placed")
    over_time = html.split("against simulated seconds on unequal devices")[1]
    ours, theirs = re.findall(r'<polyline points="([^"]+)"', over_time)[1::-1]
    # `all` ends at 820 s, the right edge (430); `own` at 220: 50 + 380 * 220 / 820.
    assert [point.split(",")[0] for point in theirs.split()] == ["50.0", "240.0", "430.0"]
    assert [point.split(",")[0] for point in ours.split()] == ["50.0", "101.0", "152.0"]


def test_failed_cells_are_on_the_page() -> None:
    whole = synthetic()
    html = page(Comparison(whole.grid, whole.results, {"own-7": "no <room>"}), "failed")
    assert "Failed cells" in html and "no &lt;room&gt;" in html
    assert "Failed cells" not in page(whole, "fine")


def test_every_setting_has_its_own_sections() -> None:
    settings = [(("data.alpha", value),) for value in ("0.5", "9.0")]
    cells = [a_cell(method, 0, setting) for setting in settings for method in ("one", "two")]
    results = {cell.name: a_result(cell, 1.0, ALL) for cell in cells}
    grid = Grid(Path("runs/many"), "one", ["one", "two"], cells, Devices())
    html = page(Comparison(grid, results, {}), "many")
    for title in ("Results", "Paired differences", "What each device deploys", "Curves", "Cost"):
        assert (
            f"<h2>{title} · data.alpha = 0.5</h2>" in html and f"<h2>{title} · data.alpha = 9.0</h2>" in html
        )


def test_the_files_are_written_whole(tmp_path: Path) -> None:
    whole = synthetic()
    grid = Grid(tmp_path / "out", "all", whole.grid.methods, whole.grid.cells, whole.grid.devices)
    written = write_comparison(Comparison(grid, whole.results, {"x": "why"}))
    assert {path.name for path in written} == {path.name for path in (tmp_path / "out").iterdir()}
    assert (tmp_path / "out" / "table.md").read_text().endswith("Environment: python 3.11; dtype float32.\n")
    records = json.loads((tmp_path / "out" / "results.json").read_text())
    assert records["failed"] == {"x": "why"} and len(records["cells"]) == 6
    first = records["cells"][0]
    assert (first["method"], first["seed"]) == ("all", 0)
    assert first["final"]["4"] == {"loss": 2.0, "exact_match": 0.5, "rouge_l": None}
    assert first["rounds"][1] == {
        "round": 1, "training_flops": 8000.0, "bytes": 100, "simulated_seconds": 410.0,
        "loss": {"4": 3.0, "1": 4.0},
    }  # fmt: skip
