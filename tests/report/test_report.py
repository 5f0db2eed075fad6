"""The report of a run, held to numbers worked out by hand from a small synthetic run."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest

from fedflame.checked_json import read_checked, write_checked
from fedflame.config.run_config import RunConfig
from fedflame.errors import UserError
from fedflame.report import write_report
from fedflame.report.charts import Series, heat_opacity, line_chart, spread, ticks
from fedflame.report.markup import element
from fedflame.report.numbers import MISSING, duration, si
from fedflame.report.records import read_run
from fedflame.run_files import ADVICE
from fedflame.run_files.lines import last_checksum, line_of

TIERS = [8, 4, 2, 1]
LAYERS, EXPERTS, ROUNDS = 2, 3, 3
CATEGORIES = ["arithmetic", "<script>alert(1)</script>"]


def evaluation(at: int, k: int, category: str | None, loss: float, score: float | None) -> dict[str, Any]:
    return {
        "event": "evaluation",
        "round": at,
        "active_experts": k,
        "category": category,
        "loss": loss,
        "exact_match": score,
        "rouge_l": None,
        "rows": 40,
        "response_tokens": 400,
    }


def client_round(at: int, client: int) -> dict[str, Any]:
    tokens = 1000 * at
    counts = [[0] * EXPERTS for _ in range(LAYERS)]
    counts[1][2] = 250 * at * at
    counts[0][0] = tokens
    return {
        "event": "client",
        "round": at,
        "client": client,
        "active_experts": TIERS[client],
        "loss": 2.0,
        "tokens": tokens,
        "steps": 5,
        "num_examples": 30,
        "trained_examples": 20,
        "seconds": 2.0 * at,
        "training_flops": 1.5e9,
        "bytes_up": 1_050_000,
        "bytes_down": 2_000_000,
        "rescaler": [1.0, 1.0 + 0.1 * at * client],
        "counts": counts,
        "norms": {"A1": 1.0 * at, "B1": 2.0, "A2": 3.0, "B2": 4.0, "attention": 0.5, "rescaler": 0.25 / at},
        "pace": 1.0 + 0.1 * at + client,
    }


def synthetic_events() -> list[dict[str, Any]]:
    """Three rounds of four clients; client 2 (k = 2) is excluded from round 2."""
    events: list[dict[str, Any]] = []
    for at in range(ROUNDS + 1):
        if at:
            events += [client_round(at, client) for client in range(4) if (at, client) != (2, 2)]
        if at == 2:
            reason = "update has a <NaN> in 0.A1"
            events.append(
                {"event": "excluded", "round": 2, "client": 2, "active_experts": 2, "reason": reason}
            )
        for i, k in enumerate(TIERS):
            events.append(evaluation(at, k, None, 3.25 + i - 0.5 * at, 0.05 + 0.2 * at - 0.01 * i))
            events += [evaluation(at, k, name, 3.0 - 0.5 * at, 0.1 * at) for name in CATEGORIES]
        if at == 3:
            events.append({"event": "clipped", "round": 3, "client": 1, "share": 0.5})
            events.append({"event": "outlier", "round": 3, "client": 1, "times": 3.25, "limit": 3.0})
        if at:
            events.append({"event": "round", "round": at, "clients": 3 + (at != 2), "seconds": 30.0})
    return events


def write_run(folder: Path, events: list[dict[str, Any]]) -> Path:
    folder.mkdir()
    per_category = {CATEGORIES[0]: 10, CATEGORIES[1]: 20}
    clients = [
        {"client": i, "active_experts": k, "rows": 30, "per_category": per_category}
        for i, k in enumerate(TIERS)
    ]
    partition = {"partition": "dirichlet", "alpha": 0.5, "rows": 120, "categories": CATEGORIES}
    partition |= {"clients": clients, "held_out_rows": 40, "truncated_rows": 0, "skipped_rows": 0}
    tiers = [
        {"active_experts": k, "forward_flops_per_token": 1e9 + 0.5e9 * k, "training_flops_per_token": 3e9}
        for k in TIERS
    ]
    plan = {"clients": [], "tiers": tiers, "adapter_parameters": 523_000, "adapter_bytes": 2_092_000}
    files = {
        "config.json": RunConfig().model_dump(),
        "environment.json": {"python": "3.11", "fedflame": "0.1.0", "platform": "a<b"},
        "partition.json": partition,
        "plan.json": plan,
    }
    for name, value in files.items():
        write_checked(folder / name, value)
    (folder / "metrics.jsonl").touch()
    append(folder, *events)
    return folder


def append(run: Path, *events: dict[str, Any]) -> None:
    """Add lines as a run that goes on adds them."""
    path = run / "metrics.jsonl"
    before = last_checksum(path, path.stat().st_size)
    for event in events:
        line, before = line_of(event, before)
        with path.open("ab") as file:
            file.write(line)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "first-light", synthetic_events())


def report(run: Path) -> str:
    path = write_report(run)
    assert path == run / "report.html"
    return path.read_text(encoding="utf-8")


def part(html: str, title: str) -> str:
    """The section of the page under a heading."""
    found = re.search(rf"<section><h2>{title}</h2>(.*?)</section>", html, re.S)
    assert found, f"no section {title!r}"
    return found[1]


def rows(html: str) -> list[list[str]]:
    """The text of each table row, cell by cell; spans run together, titles dropped."""
    html = re.sub(r"<title>.*?</title>", "", html)
    cells = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in re.findall(r"<tr>(.*?)</tr>", html)]
    return [[re.sub(r"<[^>]+>", "", cell) for cell in row] for row in cells]


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


def test_heat_map_shows_counts_over_tokens_of_all_rounds(run: Path) -> None:
    maps = dict(
        re.findall(r'<figure data-client="(\d)">(.*?)</figure>', part(report(run), "Expert activation"))
    )
    assert list(maps) == ["0", "1", "2", "3"]
    # Client 0: 250 * (1 + 4 + 9) of 6000 tokens; client 2 without round 2: 250 * (1 + 9) of 4000.
    assert "layer 1, expert 2: 0.5833" in maps["0"]
    assert "layer 1, expert 2: 0.6250" in maps["2"]
    assert "layer 0, expert 0: 1.0000" in maps["0"]
    assert "4 of 6 never activated" in maps["0"]
    assert maps["0"].count('class="never"') == 4
    ink = math.sqrt(3500 / 6000)
    assert f'fill-opacity="{ink:.2f}"' in maps["0"]
    assert heat_opacity(0.25) == 0.5


def test_line_chart_places_points_by_hand() -> None:
    # Ticks run from 1 to 3, so 3 is at the top (20), 1 at the bottom (240); rounds 0..2 span 50..430.
    chart = line_chart([Series("k = 8", 0, [(0, 3.0), (1, 1.5), (2, 1.0)])], "loss")
    assert re.findall(r'points="([^"]+)"', chart) == ["50.0,20.0 240.0,185.0 430.0,240.0"]
    assert "k = 8, round 1: loss 1.5" in chart


def test_chart_of_the_run_shows_every_tier(run: Path) -> None:
    over_rounds = part(report(run), "Over rounds")
    assert over_rounds.count("<polyline") == 12, "loss, score and training loss of four tiers"
    # Exact match at k = 8 is 5, 25, 45 and 65 % on an axis from 0 to 80.
    height = [240 - 220 * score / 80 for score in (5, 25, 45, 65)]
    across = [50.0, 176.7, 303.3, 430.0]
    points = " ".join(f"{x:.1f},{round(y, 1):.1f}" for x, y in zip(across, height, strict=True))
    assert f'points="{points}"' in over_rounds


def test_how_the_clients_trained_is_drawn_by_the_k_that_they_trained_with(tmp_path: Path) -> None:
    """Two clients at k = 8 with 100 and 300 tokens; one at k = 4 that withholds its loss."""

    def trained(at: int, client: int, k: int, loss: float | None, tokens: int, rate: float) -> dict[str, Any]:
        changes = {"active_experts": k, "loss": loss, "tokens": tokens, "learning_rate": rate}
        return client_round(at, client) | changes

    events = [
        trained(1, 0, 8, 4.0, 100, 4e-5),
        trained(1, 1, 8, 2.0, 300, 2e-5),
        trained(1, 2, 4, None, 50, 1e-5),
        trained(2, 0, 8, 1.0, 100, 1e-5),
    ]
    over_rounds = part(report(write_run(tmp_path / "run", events)), "Over rounds")
    loss, rate = re.findall(r"<figure>(.*?)</figure>", over_rounds, re.S)
    assert "k = 8, round 1: Training loss 2.5" in loss and "k = 8, round 2: Training loss 1" in loss
    assert "k = 4, round" not in loss
    assert "k = 8, round 1: Learning rate (1e-5) 3" in rate
    assert "k = 4, round 1: Learning rate (1e-5) 1" in rate
    stepped = [event | {"step_losses": [event["loss"] + 1, event["loss"] - 1]} for event in events[:2]]
    over_rounds = part(report(write_run(tmp_path / "steps", stepped)), "Over rounds")
    assert "k = 8, round 0: Training loss 4" in over_rounds
    assert "k = 8, round 1: Training loss 2" in over_rounds
    many = [event | {"step_losses": [1.0] * 100} for event in events[:1]]
    over_rounds = part(report(write_run(tmp_path / "many", many)), "Over rounds")
    loss, _ = re.findall(r"<figure>(.*?)</figure>", over_rounds, re.S)
    assert len(re.findall(r'points="([^"]+)"', loss)[0].split()) == 100 and "<circle" not in loss
    alike = [event | {"learning_rate": 4e-5 / event["round"]} for event in events]
    over_rounds = part(report(write_run(tmp_path / "alike", alike)), "Over rounds")
    _, rate = re.findall(r"<figure>(.*?)</figure>", over_rounds, re.S)
    assert rate.count("<polyline") == 1 and "every k, round 2: Learning rate (1e-5) 2" in rate


def test_ticks_are_round_and_cover_the_range() -> None:
    assert ticks(1.0, 3.0) == [1.0, 1.5, 2.0, 2.5, 3.0]
    assert ticks(0.0, 65.0) == [0.0, 20.0, 40.0, 60.0, 80.0]
    flat = ticks(2.0, 2.0)
    assert flat[0] <= 2.0 < flat[-1]


def test_labels_that_would_touch_are_spread_in_order() -> None:
    assert spread([100.0, 40.0, 102.0]) == [100.0, 40.0, 115.0]
    assert spread([239.0, 240.0]) == [225.0, 240.0]


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


def test_a_run_whose_updates_were_not_measured_has_a_report(tmp_path: Path) -> None:
    events = synthetic_events()
    for event in events:
        for name in ("norms", "pace"):
            event.pop(name, None)
    assert "No update is measured yet." in report(write_run(tmp_path / "run", events))


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
