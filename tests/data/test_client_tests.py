"""The rows that clients score: a share of their own, or files of their own, and never rows of training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from tests.data.owned_files import numbered, write_texts
from tests.tiny_runs import invoke, set_options

from fedflame.config.load import load_config
from fedflame.data.client_tests import split_test
from fedflame.data.conversations import Conversation, single_turn
from fedflame.data.federation import Federation, describe, load_federation
from fedflame.data.rows import load_rows
from fedflame.errors import UserError

ASKED = "server.fraction_evaluate=1"


def rows(*texts: str) -> list[Conversation]:
    return [single_turn(text, "", text.upper(), "all") for text in texts]


def scored_texts(texts: Sequence[str], test_size: float, seed: int = 0) -> set[str]:
    trained, scored = split_test(rows(*texts), test_size, seed)
    assert sorted([*trained, *scored]) == list(range(len(texts))) and trained == sorted(trained)
    assert scored == sorted(scored)
    return {texts[index] for index in scored}


@pytest.mark.parametrize("size", [0.1, 0.5, 0.9])
def test_about_the_share_is_scored(size: float) -> None:
    """Of 2000 rows; five standard deviations of a binomial are at most 112."""
    assert abs(len(scored_texts(numbered("row", 2000), size)) - 2000 * size) < 112


def test_a_row_keeps_its_side_when_others_come_or_are_in_another_order() -> None:
    few, many = numbered("row", 40), numbered("row", 400)
    before = scored_texts(few, 0.2)
    assert before == scored_texts(many, 0.2) & set(few) == scored_texts(few[::-1], 0.2)
    assert before != scored_texts(few, 0.2, seed=1)
    assert before < scored_texts(few, 0.5), "a larger share keeps what was held out"


def test_copies_are_on_one_side_also_where_they_differ_in_category() -> None:
    texts = numbered("row", 60)
    twice = [*rows(*texts), *(single_turn(text, "", text.upper(), "other") for text in texts)]
    _, scored = split_test(twice, 0.3, 0)
    assert scored and {index + 60 for index in scored if index < 60} == {i for i in scored if i >= 60}


@pytest.mark.parametrize("size", [1e-9, 0.5, 1 - 1e-9])
@pytest.mark.parametrize("seed", range(8))
def test_of_two_rows_that_differ_one_is_scored_and_one_trained_on(size: float, seed: int) -> None:
    assert len(scored_texts(["one", "two"], size, seed)) == 1
    for few in ([], ["one"], ["one", "one", "one"]):
        assert split_test(rows(*few), size, seed) == (list(range(len(few))), [])
    three = scored_texts(["one", "two", "two", "two"], size, seed)
    assert len(three) == 1


def test_without_a_client_that_is_asked_nothing_is_held_out() -> None:
    plain = load_federation(load_config(None, ["data.max_rows=200"]))
    other = load_federation(load_config(None, ["data.max_rows=200", "evaluation.client_test_size=0.4"]))
    assert plain == other and plain.tests == () and plain.digest == other.digest
    assert all("test_rows" not in client for client in describe(plain, [8, 4, 2, 1]))


def test_each_client_is_scored_on_its_own_rows_and_nobody_trains_on_them() -> None:
    settings = ["data.max_rows=300", "evaluation.client_test_size=0.2"]
    plain = load_federation(load_config(None, settings))
    federation = load_federation(load_config(None, [*settings, ASKED]))
    for client, (part, tests) in enumerate(zip(federation.parts, federation.tests, strict=True)):
        own = [plain.training[index] for index in plain.parts[client]]
        trained, scored = split_test(own, 0.2, 0)
        assert tests and tests == [own[index] for index in scored]
        assert [federation.training[index] for index in part] == [own[index] for index in trained]
    everyone = {row.content for row in federation.training}
    assert not everyone & {row.content for tests in federation.tests for row in tests}
    assert federation.held_out == plain.held_out and federation.digest != plain.digest
    told = describe(federation, [8, 4, 2, 1])
    assert [client["test_rows"] for client in told] == [len(tests) for tests in federation.tests]


def test_rows_are_capped_before_some_are_held_out() -> None:
    settings = ["data.max_rows=300", "data.max_rows_per_client=20", ASKED]
    federation = load_federation(load_config(None, settings))
    sizes = [len(part) + len(tests) for part, tests in zip(federation.parts, federation.tests, strict=True)]
    assert sizes == [20] * 4


@pytest.fixture
def silos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name, count in (("silo-2", 20), ("silo-10", 30), ("silo-1", 9)):
        write_texts(tmp_path / "silos" / f"{name}.jsonl", numbered(name, count))
        write_texts(tmp_path / "tests" / f"{name}.jsonl", numbered(f"test of {name}", count // 3))
    return tmp_path


FILES = ["data.client_files=silos/*.jsonl", "evaluation.rows_per_category=5"]
TESTS = [*FILES, ASKED, "data.client_test_files=tests/*.jsonl"]


def said(federation: Federation) -> list[list[str]]:
    return [[row.turns[0].content for row in tests] for tests in federation.tests]


def test_each_client_is_scored_on_all_rows_of_its_test_file(silos: Path) -> None:
    federation, plain = load_federation(load_config(None, TESTS)), load_federation(load_config(None, FILES))
    assert federation.names == ("silo-1", "silo-2", "silo-10")
    wanted = [numbered(f"test of {name}", count) for name, count in (("silo-1", 3), ("silo-2", 6))]
    assert said(federation) == [*wanted, numbered("test of silo-10", 10)]
    assert (federation.training, federation.parts) == (plain.training, plain.parts)


def test_a_test_file_without_rows_is_a_client_that_scores_nothing(silos: Path) -> None:
    (silos / "tests" / "silo-2.jsonl").write_text("")
    assert [len(tests) for tests in said(load_federation(load_config(None, TESTS)))] == [3, 0, 10]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([ASKED, "data.client_test_files=tests/*.jsonl"], "client_test_files needs data.client_files"),
        ([FILES[0], TESTS[-1]], "data.client_test_files needs server.fraction_evaluate; set it, or leave"),
        ([*TESTS[:-1], "data.client_test_files=tests/*1.jsonl"], "1 files for the 3 of data.client_files"),
        ([*TESTS[:-1], "data.client_test_files=s*/*.jsonl"], r"silo-1\.jsonl is in data\.client_files, too"),
        ([*TESTS[:-1], "data.client_test_files=none"], r"data\.client_test_files = 'none': no such file"),
        (["evaluation.client_test_size=1"], "evaluation.client_test_size = '1': Input should be less than 1"),
        (["server.fraction_evaluate=1.5"], "server.fraction_evaluate = '1.5': Input should be less than or"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(silos: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_federation(load_config(None, overrides))


def test_split_writes_the_rows_to_score_beside_those_to_train_on(tmp_path: Path) -> None:
    settings = set_options("data.max_rows=200", ASKED)
    told = invoke("split", "--output-dir", tmp_path / "silos", *settings)
    assert told.exit_code == 0, told.output
    federation = load_federation(load_config(None, ["data.max_rows=200", ASKED]))
    for client, tests in enumerate(federation.tests):
        assert load_rows(dataset_name=str(tmp_path / f"silos/test/client-{client}.jsonl")).rows == tests
        trained = load_rows(dataset_name=str(tmp_path / f"silos/client-{client}.jsonl")).rows
        assert trained == [federation.training[index] for index in federation.parts[client]]
    assert f"{len(federation.tests[0])} rows to score" in told.output.replace("\n", "")
