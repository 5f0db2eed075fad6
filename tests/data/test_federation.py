"""Training, test and validation rows of one configuration: apart from each other, and the same each time."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedflame.config.load import load_config
from fedflame.data.federation import Federation, load_federation
from fedflame.data.conversations import Conversation
from fedflame.data.skills import CATEGORIES
from fedflame.errors import UserError


def both_splits(*overrides: str) -> tuple[Federation, Federation]:
    """The federation with `evaluation.split` test and validation."""
    test, validation = (
        load_federation(load_config(None, [*overrides, f"evaluation.split={split}"]))
        for split in ("test", "validation")
    )
    assert (validation.training, validation.parts) == (test.training, test.parts)
    return test, validation


def content(rows: list[Conversation]) -> set[tuple[str, str, str]]:
    return {(row.turns[0].content, row.turns[0].context, row.response) for row in rows}


def assert_disjoint(test: Federation, validation: Federation) -> None:
    sets = (content(test.training), content(test.held_out), content(validation.held_out))
    assert sum(map(len, sets)) == len(set.union(*sets))


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 999), st.integers(1, 20))
def test_skills_splits_are_disjoint_and_of_one_size(seed: int, per_category: int) -> None:
    test, validation = both_splits(
        f"seed={seed}", f"evaluation.rows_per_category={per_category}", "data.max_rows=400"
    )
    assert_disjoint(test, validation)
    for federation in (test, validation):
        sizes = Counter(row.category for row in federation.held_out)
        assert sizes == dict.fromkeys(CATEGORIES, per_category)


def test_default_rows_are_those_that_results_were_reported_with() -> None:
    """Of the code before there were validation rows."""
    assert (
        load_federation(load_config(None, ["data.max_rows=900", "seed=7"])).digest
        == "232ae3df00d62f74d82e972e44f02151"
    )


def test_skills_say_when_no_problem_is_left_to_validate_on() -> None:
    with pytest.raises(UserError) as caught:
        both_splits("evaluation.rows_per_category=1000", "data.max_rows=40")
    assert str(caught.value) == (
        "skills: the test rows use up the held-out problems of words; with evaluation.split = 'validation', "
        "evaluation.rows_per_category must be lower"
    )


def rows_file(folder: str, drawn: list[tuple[int, str]]) -> Path:
    path = Path(folder) / "rows.jsonl"
    rows = [{"instruction": str(n), "output": "x", "category": label} for n, label in drawn]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 60), st.sampled_from("abc")), min_size=30, max_size=120),
    st.integers(8, 25),
    st.integers(1, 4),
    st.integers(0, 99),
)
def test_file_splits_are_disjoint(
    drawn: list[tuple[int, str]], max_rows: int, per_category: int, seed: int
) -> None:
    """With copies among the rows, and categories in which the sample leaves nothing."""
    with tempfile.TemporaryDirectory() as folder:
        path = rows_file(folder, drawn)
        overrides = (
            "clients.num_clients=2",
            "clients.active_experts=4,1",
            f"seed={seed}",
            f"data.max_rows={max_rows}",
            f"evaluation.rows_per_category={per_category}",
        )
        try:
            test, validation = both_splits(f"data.dataset_name={path}", *overrides)
        except UserError as error:
            assert "too few to hold some out" in str(error) or "must leave some" in str(error)
            return
    assert_disjoint(test, validation)
    assert len(test.training) + len(test.held_out) == max_rows
    sampled = content(test.training) | content(test.held_out)
    free = Counter(label for n, label in drawn if (str(n), "", "x") not in sampled)
    sizes = Counter(row.category for row in test.held_out)
    wanted = {label: min(size, free[label]) for label, size in sizes.items() if free[label]}
    assert Counter(row.category for row in validation.held_out) == wanted


def test_validation_rows_by_hand(tmp_path: Path) -> None:
    path = rows_file(str(tmp_path), [(n, "ab"[n % 2]) for n in range(100)])
    test, validation = both_splits(
        f"data.dataset_name={path}", "data.max_rows=50", "evaluation.rows_per_category=3"
    )
    assert len(test.training) == 44
    for federation in (test, validation):
        numbers = [int(row.turns[0].content) for row in federation.held_out]
        assert numbers == sorted(numbers)
        assert Counter(row.category for row in federation.held_out) == {"a": 3, "b": 3}


def test_a_file_used_whole_has_no_validation_rows(tmp_path: Path) -> None:
    path = rows_file(str(tmp_path), [(n, "a") for n in range(40)])
    with pytest.raises(UserError) as caught:
        both_splits(f"data.dataset_name={path}")
    assert str(caught.value) == (
        f"{path}: 40 usable rows; data.max_rows = 0 must leave some of them for "
        "evaluation.split = 'validation'"
    )
