"""The grid file: which cells it makes, and what it refuses."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tests.refusals import refusal_of

from fedflame.compare.devices import Devices
from fedflame.compare.grid import Cell, Grid, read_grid
from fedflame.config.load import load_config
from fedflame.errors import UserError

ROOT = Path(__file__).parents[2]
GRID = """
output_dir = "runs/some"
baseline = "plain"
[base]
data.max_rows = 40
training = { max_steps = 3 }
[methods.flame]
strategy.name = "flame"
strategy.temperature = 2.0
[methods.plain]
strategy.name = "fedavg"
[grid]
seed = [0, 1, 2]
"data.alpha" = [0.5, 5.0]
[devices]
bytes_per_second = 1e5
"""


def grid(tmp_path: Path, text: str = GRID, *overrides: str, output_dir: str | None = None) -> Grid:
    path = tmp_path / "grid.toml"
    path.write_text(text)
    return read_grid(path, overrides, output_dir)


def refused(tmp_path: Path, text: str, *overrides: str) -> str:
    return refusal_of(grid, tmp_path, text, *overrides)


def test_every_combination_is_a_cell_in_the_order_of_the_file(tmp_path: Path) -> None:
    found = grid(tmp_path)
    assert [(cell.config.seed, cell.config.data.alpha, cell.method) for cell in found.cells] == [
        (seed, alpha, method) for seed in (0, 1, 2) for alpha in (0.5, 5.0) for method in ("flame", "plain")
    ]
    assert found.settings() == [(("data.alpha", "0.5"),), (("data.alpha", "5.0"),)]
    assert (found.baseline, found.methods) == ("plain", ["flame", "plain"])
    assert found.devices.bytes_per_second == 1e5


def test_a_cell_is_an_ordinary_run_over_one_mapped_base(tmp_path: Path) -> None:
    cell = grid(tmp_path).cells[0]
    settings = ["data.max_rows=40", "training.max_steps=3", "strategy.temperature=2.0", "data.alpha=0.5"]
    expected = load_config(None, [*settings, f"output_dir={cell.run}"])
    assert cell.config == expected
    assert cell.run == Path("runs/some") / "cells" / cell.name / "run"
    assert cell.name.startswith("flame-alpha-0.5-seed-0-")


def test_dotted_quoted_and_nested_keys_are_the_same(tmp_path: Path) -> None:
    quoted = GRID.replace("data.max_rows", '"data.max_rows"').replace('"data.alpha"', "data.alpha")
    assert grid(tmp_path, quoted) == grid(tmp_path)


def test_what_a_grid_shares_with_a_larger_one_keeps_its_folders(tmp_path: Path) -> None:
    small = {cell.name for cell in grid(tmp_path, GRID.replace("[0, 1, 2]", "[0, 1]")).cells}
    large = {cell.name for cell in grid(tmp_path).cells}
    assert len(small) == 8 and small < large


@pytest.mark.parametrize("change", [("max_rows = 40", "max_rows = 41"), ("max_steps = 3", "max_steps = 4")])
def test_another_base_shares_no_folder(tmp_path: Path, change: tuple[str, str]) -> None:
    before = {cell.name for cell in grid(tmp_path).cells}
    assert before.isdisjoint(cell.name for cell in grid(tmp_path, GRID.replace(*change)).cells)


def test_devices_and_output_dir_are_no_part_of_a_cell(tmp_path: Path) -> None:
    slower = grid(tmp_path, GRID.replace("1e5", "2e5"), output_dir=str(tmp_path / "out"))
    assert slower.output_dir == tmp_path / "out"
    assert [cell.name for cell in slower.cells] == [cell.name for cell in grid(tmp_path).cells]


def test_overrides_win_in_every_cell(tmp_path: Path) -> None:
    cells = grid(tmp_path, GRID, "training.max_steps=7").cells
    assert {cell.config.training.max_steps for cell in cells} == {7}


def test_a_point_of_an_axis_may_set_several_keys(tmp_path: Path) -> None:
    points = '[{num_clients = 2, active_experts = "8,1"}, {num_clients = 3, active_experts = "4,2,1"}]'
    found = grid(tmp_path, GRID.replace('"data.alpha" = [0.5, 5.0]', f"clients = {points}"))
    assert len(found.cells) == 12
    assert {(tuple(cell.config.afforded_experts()), cell.setting) for cell in found.cells} == {
        ((8, 1), (("clients.num_clients", "2"), ("clients.active_experts", "8,1"))),
        ((4, 2, 1), (("clients.num_clients", "3"), ("clients.active_experts", "4,2,1"))),
    }


def test_a_path_on_an_axis_makes_a_folder_name(tmp_path: Path) -> None:
    data = '"data.dataset_name" = ["skills", "/some where/rows.jsonl.gz"]'
    cells = grid(tmp_path, GRID.replace('"data.alpha" = [0.5, 5.0]', data)).cells
    assert cells[2].name.startswith("flame-dataset_name-rows.jsonl.gz-seed-0-")
    assert all("/" not in cell.name and " " not in cell.name for cell in cells)


def test_without_axes_there_is_a_cell_per_method_and_the_first_is_the_baseline(tmp_path: Path) -> None:
    found = grid(tmp_path, "[methods.a]\nadapter.r = 4\n[methods.b]\n")
    assert [cell.method for cell in found.cells] == ["a", "b"]
    assert found.baseline == "a"


SEEDS, ROWS = "[0, 1, 2]", "data.max_rows = 40"
MISTAKES = [
    (
        "strategy.temperature",
        "strategy.temprature",
        "the nearest valid key is 'strategy.temperature' (method flame, ",
    ),
    (
        "[0.5, 5.0]",
        "[0.5, -1]",
        "data.alpha = '-1': Input should be greater than 0 (method flame, seed = 0, ",
    ),
    (SEEDS, '["first"]', "config: seed = 'first': "),
    (SEEDS, "3", "grid: seed = 3: must be a list of at least one value"),
    (SEEDS, "[]", "grid: seed = []: must be a list of at least one value"),
    (SEEDS, "[0, 1, 1]", "are the same run; drop one of them"),
    ("[devices]", "[device]", "unknown key 'device'; the nearest valid key is 'devices'"),
    ("1e5", "0", "devices.bytes_per_second = 0: Input should be greater than 0"),
    ('= "plain"', '= "plane"', "baseline = 'plane': must be one of the methods flame, plain"),
    (ROWS, "data.alpha = 1", "data.alpha is an axis of [grid]; neither [base] nor a method may set it"),
    (ROWS, 'output_dir = "x"', "grid: output_dir is set once"),
]


@pytest.mark.parametrize(("old", "new", "line"), MISTAKES)
def test_a_mistake_in_the_file_is_one_line(tmp_path: Path, old: str, new: str, line: str) -> None:
    assert old in GRID
    assert line in refused(tmp_path, GRID.replace(old, new))


def test_a_method_name_that_is_no_folder_name_is_refused(tmp_path: Path) -> None:
    assert refused(tmp_path, '[methods."../a"]\n') == (
        "grid: method '../a': a name may have letters, digits and . _ - only"
    )


def test_a_grid_without_methods_is_refused(tmp_path: Path) -> None:
    assert refused(tmp_path, "[grid]\nseed = [1]\n").startswith("grid: no method")


def test_an_override_of_an_axis_makes_all_its_cells_the_same(tmp_path: Path) -> None:
    assert "are the same run" in refused(tmp_path, GRID, "seed=4")


def test_an_override_of_the_output_dir_is_refused(tmp_path: Path) -> None:
    assert "output_dir is set once" in refused(tmp_path, GRID, "output_dir=elsewhere")


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        read_grid(tmp_path / "none.toml", [], None)


def test_names_are_unique(tmp_path: Path) -> None:
    cells: list[Cell] = grid(tmp_path).cells
    assert len({cell.name for cell in cells}) == len(cells)


def test_the_grid_of_the_benchmark_is_valid() -> None:
    found = read_grid(ROOT / "benchmarks" / "dolly-tiers" / "grid.toml", [], None)
    assert [cell.config.trained_experts(8, 1) for cell in found.cells[:3]] == [
        [8, 8, 4, 4, 2, 2, 1, 1],
        [1] * 8,
        [8] * 8,
    ]
    assert len(found.cells) == 9


@pytest.mark.parametrize(
    "path", sorted((ROOT / "benchmarks").glob("*/*.toml")), ids=lambda path: f"{path.parent.name}/{path.stem}"
)
def test_every_grid_of_the_benchmarks_is_valid(path: Path) -> None:
    assert read_grid(path, [], None).cells


def test_the_grid_of_the_document_is_valid_and_names_the_default_devices(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "compare.md").read_text(encoding="utf-8")
    found = grid(tmp_path, re.findall(r"```toml\n(.*?)```", text, re.S)[0])
    assert len(found.cells) == 12 and found.devices == Devices()
