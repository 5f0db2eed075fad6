"""The results file: exact, in a stable order, whole at any instant, and refused where it is damaged."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.compare.synthetic import OWN, a_cell, a_result, synthetic
from tests.refusals import refusal_of

from fedflame.compare import results as results_module
from fedflame.compare.devices import ClientWork
from fedflame.compare.grid import Cell, read_grid
from fedflame.compare.results import (
    RESULTS,
    CellResult,
    Deployed,
    has_left_result,
    read_results,
    take_over,
    write_results,
)
from fedflame.config.run_config import SCHEMA_VERSION
from fedflame.report.events import Evaluation

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
COUNTS = st.integers(0, 2**62)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]))
MEASURES = st.none() | st.floats()
"""Not a number and infinite ones too: a run that diverges has them."""
VALUES = st.recursive(
    st.none() | st.booleans() | COUNTS | st.floats(allow_nan=False, allow_infinity=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)
CELLS = st.builds(
    CellResult,
    cell=TEXTS,
    method=TEXTS,
    setting=st.dictionaries(TEXTS, TEXTS, max_size=3),
    seed=COUNTS,
    score=st.sampled_from([None, "exact_match", "rouge_l"]),
    evaluations=st.lists(
        st.builds(Evaluation, COUNTS, COUNTS, st.none() | TEXTS, MEASURES, MEASURES, MEASURES), max_size=3
    ),
    clients=st.lists(
        st.builds(
            ClientWork, *[COUNTS] * 5, seconds=st.floats(), training_flops=st.floats(), bytes_up=COUNTS,
            bytes_down=COUNTS,
        ),
        max_size=3,
    ),
    training_flops=st.dictionaries(COUNTS, st.floats(), max_size=3),
    environment=st.dictionaries(TEXTS, VALUES, max_size=3),
    deployed=st.lists(
        st.builds(Deployed, COUNTS, COUNTS, COUNTS, MEASURES, MEASURES, MEASURES, MEASURES), max_size=3
    ),
    config=st.dictionaries(TEXTS, VALUES, max_size=3),
)  # fmt: skip


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """The results file of the synthetic comparison."""
    write_results(tmp_path / RESULTS, synthetic().results.values())
    return tmp_path / RESULTS


def line(path: Path) -> str:
    """The one line of what is said of this file."""
    return refusal_of(read_results, path)


@pytest.mark.slow
@given(st.lists(CELLS, max_size=3, unique_by=lambda result: result.cell))
def test_what_is_written_is_read_exactly(
    tmp_path_factory: pytest.TempPathFactory, results: list[CellResult]
) -> None:
    path = tmp_path_factory.getbasetemp() / "exact.jsonl"
    write_results(path, results)
    written, read = path.read_bytes(), read_results(path)
    # By repr, in which a value that is not a number is equal to another.
    assert {name: repr(result) for name, result in read.items()} == {
        result.cell: repr(result) for result in results
    }
    write_results(path, reversed(read.values()))
    assert path.read_bytes() == written


def test_each_cell_has_a_line_by_name_below_the_schema_version(file: Path) -> None:
    head, *cells = map(json.loads, file.read_text().splitlines())
    assert head == {"schema_version": SCHEMA_VERSION}
    assert [cell["cell"] for cell in cells] == sorted(synthetic().results)


def test_no_file_is_no_results(tmp_path: Path) -> None:
    assert read_results(tmp_path / RESULTS) == {}


Change = Callable[[list[str]], list[str]]
DAMAGES: list[tuple[Change, str]] = [
    (lambda lines: [*lines[:2], lines[2][:70], *lines[3:]], ":3: not the results of a cell: not JSON: "),
    (lambda lines: [*lines, "<<<<<<< ours"], ":8: not the results of a cell: not JSON: "),
    (lambda lines: [lines[0], lines[1].replace('"seed":0', '"seed":"0"')], ":2: not the results of a cell: "),
    (lambda lines: [lines[0], lines[1].replace('"tokens"', '"token"')], "clients.0.tokens: Field required"),
    (lambda lines: [lines[0], lines[1].replace('"seed":0', '"seed":0,"x":1')], "cell: x: Unexpected keyword"),
    (lambda lines: [*lines, lines[2]], ":8: all-1 has a line above; delete one of the two"),
    (lambda lines: [json.dumps({"schema_version": SCHEMA_VERSION + 1}), *lines[1:]], "another --output-dir"),
    (lambda lines: lines[1:], ": not a results file: its first line must be {"),
    (lambda lines: ["dear diary"], ": not a results file: its first line must be {"),
    (lambda lines: [], ": not a results file: its first line must be {"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "said"), DAMAGES)
def test_a_file_that_is_damaged_is_refused_and_stays(file: Path, change: Change, said: str) -> None:
    damaged = "".join(f"{line}\n" for line in change(file.read_text().splitlines()))
    file.write_text(damaged)
    assert line(file).startswith(str(file)) and said in line(file)
    assert file.read_text() == damaged


def test_another_schema_version_is_named(file: Path) -> None:
    file.write_text('{"schema_version": 7}\n{"of": "another shape"}\n')
    assert line(file) == (
        f"{file}: has schema version 7; this version of fedflame reads {SCHEMA_VERSION}: "
        "use the one that wrote it, or another --output-dir"
    )


def test_a_folder_in_its_place_is_one_line(tmp_path: Path) -> None:
    assert line(tmp_path) == f"{tmp_path}: Is a directory; it must be a results file"


def left_cell(folder: Path) -> tuple[Cell, CellResult]:
    """A finished cell that waits to be taken over."""
    cell = replace(a_cell("own", 7), folder=folder / "cells" / "own-7")
    result = a_result(cell, 1.0, OWN)
    write_results(cell.folder / "cell.jsonl", [result])
    assert has_left_result(cell)
    return cell, result


@pytest.mark.parametrize("written", [False, True], ids=["before it is recorded", "after it is recorded"])
def test_a_kill_while_a_cell_is_taken_over_loses_nothing(
    file: Path, monkeypatch: pytest.MonkeyPatch, written: bool
) -> None:
    cell, result = left_cell(file.parent)
    expected = {**read_results(file), cell.name: result}

    def dies(path: Path, content: bytes) -> None:
        if written:
            path.write_bytes(content)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(results_module, "write_atomically", dies)
        take_over(file, read_results(file), [cell])
    assert has_left_result(cell) and (cell.name in read_results(file)) == written
    assert take_over(file, read_results(file), [cell]) == expected == read_results(file)
    assert not has_left_result(cell)


def test_where_nothing_was_left_nothing_is_written(file: Path) -> None:
    before = file.stat().st_mtime_ns
    kept = read_results(file)
    assert take_over(file, kept, synthetic().grid.cells) == kept
    assert file.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    "file", sorted(BENCHMARKS.rglob(RESULTS)), ids=lambda file: str(file.parent.relative_to(BENCHMARKS))
)
def test_the_results_of_the_benchmarks_are_those_of_their_grids(file: Path) -> None:
    benchmark = next(folder for folder in file.parents if folder.parent == BENCHMARKS)
    name = "grid" if file.parent.name == "results" else file.parent.name
    cells = {cell.name: cell for cell in read_grid(benchmark / f"{name}.toml", [], None).cells}
    for found in read_results(file).values():
        cell = cells[found.cell]
        assert (found.method, found.setting, found.seed) == (
            cell.method, dict(cell.setting), cell.config.seed,
        )  # fmt: skip
