from __future__ import annotations

import math
from dataclasses import replace

import pytest
from tests.compare.synthetic import ALL, a_cell, a_result, synthetic

from fedflame.compare.comparison import Comparison
from fedflame.compare.results import CellResult, Spent


def test_means_and_spread_of_the_final_models() -> None:
    comparison = synthetic()
    own = comparison.final((), "own", "loss", 4)
    assert own is not None and own.count == 3
    assert own.mean == pytest.approx(1.3)
    assert own.deviation == pytest.approx(0.3)
    weak = comparison.final((), "own", "loss", 1)
    assert weak is not None and weak.mean == pytest.approx(2.3)
    start = comparison.start((), "all", "loss", 4)
    assert start is not None and start.mean == pytest.approx((4.0 + 4.2 + 4.7) / 3)
    assert comparison.final((), "own", "rouge_l", 4) is None


def test_differences_are_taken_seed_by_seed() -> None:
    # -1.0, -0.9, -1.1: mean -1, deviation 0.1; unpaired, the spread would be that of the losses.
    difference = synthetic().difference((), "own", "loss", 4)
    assert difference is not None and difference.interval is not None
    assert difference.mean == pytest.approx(-1.0)
    reach = 4.302653 * 0.1 / math.sqrt(3)
    assert difference.interval == pytest.approx((-1 - reach, -1 + reach))
    assert difference.verdict(rising=False) == "better"


def test_what_devices_deploy_by_hand() -> None:
    comparison, reading = synthetic(), CellResult.last_deployed
    assert comparison.budgets(()) == [4, 1]
    means = {
        (method, budget): comparison.final((), method, "loss", budget, reading)
        for method in ("own", "all")
        for budget in (4, 1)
    }
    # own: 1.0, 1.3, 1.6 on the strong device and one nat more on the weak one; all: 2.0, 2.2, 2.7 and half a
    # nat more.
    wanted = {("own", 4): 1.3, ("own", 1): 2.3, ("all", 4): 2.3, ("all", 1): 2.8}
    assert {place: summary and summary.mean for place, summary in means.items()} == pytest.approx(wanted)
    difference = comparison.difference((), "own", "loss", 1, reading)
    assert difference is not None and difference.mean == pytest.approx(-0.5)
    assert comparison.final((), "own", "exact_match", 1, reading) is None
    weak = comparison.deployed((), "all", 1)
    assert weak is not None and (weak.active_experts, weak.rank, weak.relative_flops) == (4, 2, 0.95)


def test_a_missing_cell_leaves_its_pair_out() -> None:
    whole = synthetic()
    results = {name: result for name, result in whole.results.items() if name != "all-1"}
    comparison = Comparison(whole.grid, results, {"all-1": "gone"})
    difference = comparison.difference((), "own", "loss", 4)
    assert difference is not None and difference.count == 2
    assert difference.mean == pytest.approx((-1.0 - 1.1) / 2)
    assert [len(comparison.seeds((), method)) for method in ("own", "all")] == [3, 2]
    no_baseline = Comparison(whole.grid, {"own-0": whole.results["own-0"]}, {})
    assert no_baseline.difference((), "own", "loss", 4) is None
    assert no_baseline.methods(()) == ["own"]


def test_settings_are_kept_apart() -> None:
    whole, other = synthetic(), (("data.alpha", "9.0"),)
    cells = [a_cell(method, 0, other) for method in ("all", "own")]
    losses = zip(cells, (7.0, 8.0), strict=True)
    results = dict(whole.results) | {cell.name: a_result(cell, loss, ALL) for cell, loss in losses}
    comparison = Comparison(replace(whole.grid, cells=[*whole.grid.cells, *cells]), results, {})
    assert comparison.settings() == [(), other]
    difference = comparison.difference(other, "own", "loss", 4)
    assert difference is not None and (difference.count, difference.mean) == (1, 1.0)
    assert comparison.difference((), "own", "loss", 4) == whole.difference((), "own", "loss", 4)


def test_what_is_spent_adds_up_over_rounds() -> None:
    comparison = synthetic()
    # A round of `own`: 100 tokens of 40 and of 10 FLOPs, 4 * 25 bytes; both devices take 100 s and 10 s.
    # The weak device of `all` has 40 * 10 / 40 FLOPs a second: 4000 / 10 and 10 s.
    expected = {
        "own": [Spent(at, at * 5000.0, at * 100.0, at * 110.0) for at in range(3)],
        "all": [Spent(at, at * 8000.0, at * 100.0, at * 410.0) for at in range(3)],
    }
    for method, points in expected.items():
        curve = comparison.curve((), method, "loss", 4)
        assert [point.spent for point in curve] == points
        assert comparison.total((), method) == points[-1]
    means = [point.summary.mean for point in comparison.curve((), "own", "loss", 4)]
    assert means == pytest.approx([3.3, 2.3, 1.3])


def test_a_curve_has_the_rounds_at_which_the_score_was_taken() -> None:
    curve = synthetic().curve((), "own", "exact_match", 1)
    assert [(point.spent.round, point.summary.mean) for point in curve] == [(0, 0.0), (2, 0.5)]


def test_the_cost_of_each_device() -> None:
    comparison = synthetic()
    strong, weak = comparison.device_costs((), "all")
    assert [(d.budget, d.clients, d.active_experts, d.tokens) for d in (strong, weak)] == [
        (4, 1, "4", 200),
        (1, 1, "4", 200),
    ]
    assert (strong.training_flops, strong.bytes_up, strong.bytes_down) == (8000, 60, 40)
    assert (strong.busy_seconds, weak.busy_seconds) == (220, 820)
    assert [d.active_experts for d in comparison.device_costs((), "own")] == ["4", "1"]
