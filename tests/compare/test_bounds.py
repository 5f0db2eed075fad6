"""Bounds in a grid and in the tables: their cells, what is refused, and numbers worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from tests.compare.synthetic import OWN, a_cell, a_result

from fedflame.compare.comparison import Comparison
from fedflame.compare.devices import Devices
from fedflame.compare.grid import Cell, Grid, read_grid
from fedflame.compare.page import page
from fedflame.compare.results import RESULTS, CellResult, OwnScores, read_results, write_results
from fedflame.compare.tables import bound_tables, measures
from fedflame.errors import UserError
from fedflame.report.events import Evaluation

GRID = """
bounds = ["standalone", "centralised"]
[base]
clients.num_clients = 3
clients.active_experts = "8,4,1"
training.max_steps = 10
[base.strategy]
rescaler = "static"
[methods.flame]
[methods.full]
strategy.temperature = 2
[grid]
seed = [0, 1]
"""


def grid_of(folder: Path, text: str, *overrides: str) -> Grid:
    (folder / "grid.toml").write_text(text)
    return read_grid(folder / "grid.toml", overrides, None)


def test_a_grid_has_a_cell_for_each_client_alone_and_one_for_all_rows(tmp_path: Path) -> None:
    cells = grid_of(tmp_path, GRID, "strategy.count_normalization=token").cells
    names = [cell.name.rpartition("-")[0] for cell in cells]
    of_seed = ["flame", "full", "standalone-0", "standalone-1", "standalone-2", "centralised"]
    assert names == [f"{name}-seed-{seed}" for seed in (0, 1) for name in of_seed]
    assert [cell.method for cell in cells[2:6]] == ["standalone"] * 3 + ["centralised"]
    assert all(cell.config.server.fraction_evaluate == 1 for cell in cells), (
        "methods are scored by clients, too"
    )
    assert [cell.config.data.trained_by for cell in cells[:6]] == ["each", "each", "0", "1", "2", "one"]
    alone, central = cells[3].config, cells[5].config
    assert alone.afforded_experts() == [8, 4, 1] and central.afforded_experts() == [8, 8, 8]
    assert (alone.training.max_steps, central.training.max_steps) == (10, 30)
    assert alone.strategy.rescaler == "learned", "the strategies of the base are no settings of a bound"


def test_without_bounds_nothing_of_a_cell_changes(tmp_path: Path) -> None:
    without = GRID.replace('bounds = ["standalone", "centralised"]', "")
    cells = grid_of(tmp_path, without).cells
    assert {cell.method for cell in cells} == {"flame", "full"}
    assert all(cell.config.server.fraction_evaluate == 0 for cell in cells)


@pytest.mark.parametrize(
    ("before", "after", "wanted"),
    [
        ("[methods.full]", "[methods.standalone]", "method 'standalone': a bound has this name"),
        ('"centralised"]', '"alone"]', "'standalone' or 'centralised'"),
        ("seed = [0, 1]", "strategy.temperature = [1, 3]", "is an axis, but no setting of bounds"),
        ("[base]", "[base]\nserver.fraction_evaluate = 0.5", "server.fraction_evaluate must be 1"),
    ],
)
def test_what_bounds_cannot_be_is_refused(tmp_path: Path, before: str, after: str, wanted: str) -> None:
    text = GRID.replace(before, after)
    if "temperature = [" in text:
        text = text.replace("strategy.temperature = 2\n", "strategy.tier_affinity = 0\n")
    with pytest.raises(UserError, match=wanted):
        grid_of(tmp_path, text)


def own(client: int, loss: float, k: int, rows: int) -> OwnScores:
    return OwnScores(client, f"clinic {client}", rows, 4, k, loss, None, None)


def a_comparison(seeds: int = 2) -> Comparison:
    """Client 0 alone 2.0 and 2.2, federated 1.5 and 1.9; client 1 alone 3.0, 3.0, federated 3.1, 3.3."""
    losses = {
        "flame": [{0: 1.5, 1: 3.1}, {0: 1.9, 1: 3.3}],
        "standalone-0": [{0: 2.0}, {0: 2.2}],
        "standalone-1": [{1: 3.0}, {1: 3.0}],
        "centralised": [{0: 1.0, 1: 1.2}, {0: 1.1, 1: 1.1}],
    }
    cells, results = list[Cell](), dict[str, CellResult]()
    for seed in range(seeds):
        for name, of_seed in losses.items():
            plain = a_cell(name, seed)
            cell = replace(plain, method=name.partition("-")[0])
            central = name == "centralised"
            scores = [
                own(
                    client,
                    loss,
                    4 if central or not client else 1,
                    90 * (client == 0) if central else 30 + 2 * seed,
                )
                for client, loss in of_seed[seed].items()
            ]
            cells.append(cell)
            results[cell.name] = replace(a_result(cell, 1.0, OWN), own=scores)
    return Comparison(Grid(Path("x"), "flame", ["flame"], cells, Devices()), results, {})


def test_the_table_says_what_each_client_has_alone_federated_and_with_all_rows() -> None:
    comparison = a_comparison()
    (table,) = bound_tables(comparison, (), measures(comparison, ())[0])
    assert table.headers == ["client", "rows", "k", "alone", "flame", "centralised", "flame minus alone"]
    texts = [[entry.text for entry in row] for row in table.rows]
    assert texts[0][:6] == ["clinic 0", "31", "4", "2.100 ± 0.141", "1.700 ± 0.283", "1.050 ± 0.071"]
    assert texts[1][:6] == ["clinic 1", "31", "1", "3.000 ± 0.000", "3.200 ± 0.141", "1.150 ± 0.071"]
    # Means over clients by seed: alone 2.5 and 2.6, federated 2.3 and 2.6.
    assert texts[2][3:6] == ["2.550 ± 0.071", "2.450 ± 0.212", "1.100 ± 0.000"]
    # -0.5 and -0.3: t = 12.706 at one degree of freedom, times 0.1.
    assert (texts[0][6], table.rows[0][6].detail) == ("-0.400 no clear difference", "[-1.671, +0.871]")
    assert texts[1][6].startswith("+0.200") and texts[2][6].startswith("-0.100")


def test_one_seed_has_no_interval_and_bounds_are_in_no_other_table() -> None:
    comparison = a_comparison(seeds=1)
    (table,) = bound_tables(comparison, (), measures(comparison, ())[0])
    assert table.rows[0][6].text == "-0.500 one seed" and table.rows[0][6].detail == ""
    assert comparison.methods(()) == ["flame"]
    central = next(name for name in comparison.results if name.startswith("centralised"))
    elsewhere = replace(comparison.results[central], evaluations=[Evaluation(0, 64, None, 1.0, None, None)])
    assert replace(comparison, results={**comparison.results, central: elsewhere}).tiers(()) == [4, 1]
    html = page(comparison, "x")
    assert "Does federating help each client?" in html and "clinic 1" in html


def test_a_missing_bound_is_a_dash() -> None:
    whole = a_comparison()
    results = {name: result for name, result in whole.results.items() if "standalone-1" not in name}
    comparison = replace(whole, results=results)
    (table,) = bound_tables(comparison, (), measures(comparison, ())[0])
    assert [entry.text for entry in table.rows[1]][3] == "\N{EN DASH}"
    assert [entry.text for entry in table.rows[1]][6] == "\N{EN DASH}"


def test_without_bounds_there_is_no_table() -> None:
    whole = a_comparison()
    kept = {name: result for name, result in whole.results.items() if name.startswith("flame")}
    comparison = replace(whole, results=kept)
    assert list(bound_tables(comparison, (), measures(comparison, ())[0])) == []
    assert "Does federating help" not in page(comparison, "x")


def test_results_come_back_and_those_without_clients_scores_are_as_before(tmp_path: Path) -> None:
    with_own, without = next(iter(a_comparison().results.values())), a_result(a_cell("plain", 0), 1.0, OWN)
    write_results(tmp_path / RESULTS, [with_own, without])
    assert read_results(tmp_path / RESULTS) == {one.cell: one for one in (with_own, without)}
    lines = (tmp_path / RESULTS).read_text().splitlines()[1:]
    assert ['"own":' in line for line in lines] == [with_own.cell in line for line in lines]


def test_a_cell_that_uses_best_rounds_has_their_values() -> None:
    evaluations = [
        Evaluation(at, k, None, loss, None, None)
        for k, losses in {4: (3.0, 1.0, 2.0), 1: (3.0, 2.5, 2.0)}.items()
        for at, loss in enumerate(losses)
    ]
    result = replace(a_result(a_cell("plain", 0), 1.0, OWN), evaluations=evaluations)
    assert [result.last("loss", k) for k in (4, 1)] == [2.0, 2.0]
    server = {"load_best_model_at_end": True, "metric_for_best_model": "loss"}
    best = replace(result, config={"server": server})
    assert [best.last("loss", k) for k in (4, 1)] == [1.0, 2.0]
