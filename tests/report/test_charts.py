"""The charts of a report: points, ticks, labels and shades, by hand."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from tests.report.synthetic import client_round, part, report, write_run

from fedflame.report.charts import Series, heat_opacity, line_chart, spread, ticks


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
