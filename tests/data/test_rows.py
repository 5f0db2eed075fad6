"""Which rows and columns of a source become conversations, and which rows are held out."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pyarrow  # type: ignore[import-untyped, unused-ignore]
import pyarrow.parquet  # type: ignore[import-untyped, unused-ignore]
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.examples_drawn import MANY
from tests.json_lines import write_lines
from tests.refusals import refusal_of

from fedflame.data.conversations import Conversation, single_turn
from fedflame.data.rows import LoadedRows, SkippedRow, load_rows, sample_rows, split_held_out
from fedflame.errors import UserError

DOLLY = {"instruction": "Name it.", "context": "A red fox.", "response": "fox", "category": "qa"}
DOLLY_ROW = single_turn("Name it.", "A red fox.", "fox", "qa")


def write_jsonl(path: Path, *objects: object) -> str:
    return str(write_lines(path, objects))


def write_parquet(path: Path, **columns: list[Any]) -> str:
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return str(path)


def refusal(**arguments: str) -> str:
    return refusal_of(load_rows, **arguments)


# Rows


def test_jsonl_with_broken_rows_keeps_the_good_ones_and_names_the_others(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    lines = [
        json.dumps(DOLLY).encode(),
        b'{"instruction": "cut',
        b"[1, 2]",
        b"   ",
        b'{"instruction": "a", "response": "b"}',
        b'{"instruction": "a", "response": null, "category": "qa"}',
        b'{"instruction": "a", "response": ["b"], "category": "qa"}',
        b'{"instruction": "a", "response": true, "category": "qa"}',
        b'{"instruction": "a", "response": NaN, "category": "qa"}',
        b'{"instruction": " ", "response": "b", "category": "qa"}',
        b'{"instruction": "a", "response": "", "category": "qa"}',
        b'{"instruction": "a", "response": "\xff", "category": "qa"}',
        b'{"instruction": "a", "response": "\\ud800", "category": "qa"}',
        b"[" * 100_000,
        b'{"instruction": 1, "context": null, "response": 2.5, "category": 3}\r',
    ]
    path.write_bytes(b"\n".join(lines))
    loaded = load_rows(dataset_name=str(path))
    assert loaded.rows == [DOLLY_ROW, single_turn("1", "", "2.5", "3")]
    assert loaded.skipped == [
        SkippedRow(f"{path}:2", "not valid JSON"),
        SkippedRow(f"{path}:3", "not a JSON object"),
        SkippedRow(f"{path}:5", "'category' is missing"),
        SkippedRow(f"{path}:6", "'response' is missing"),
        SkippedRow(f"{path}:7", "'response', message 1 is of type str, not an object"),
        SkippedRow(f"{path}:8", "'response' is of type bool, not text"),
        SkippedRow(f"{path}:9", "'response' is nan, not text"),
        SkippedRow(f"{path}:10", "'instruction' is empty"),
        SkippedRow(f"{path}:11", "'response' is empty"),
        SkippedRow(f"{path}:12", "not valid UTF-8"),
        SkippedRow(f"{path}:13", "'response' is not valid UTF-8"),
        SkippedRow(f"{path}:14", "not valid JSON"),
    ]


def test_a_row_may_lack_its_context(tmp_path: Path) -> None:
    name = write_jsonl(
        tmp_path / "rows.jsonl",
        {"instruction": "a", "output": "b"},
        {"instruction": "c", "input": "d", "output": "e"},
    )
    rows = load_rows(dataset_name=name).rows
    assert rows == [single_turn("a", "", "b", "all"), single_turn("c", "d", "e", "all")]


def test_csv_with_broken_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(
        b"\xef\xbb\xbfinstruction,context,response,category\r\n"
        b'"Say ""a"",\nthen b",,a b,qa\r\n'
        b"\r\n"
        b"short,row\r\n"
        b"bad,,\xff,qa\r\n"
        b"empty,,,qa\r\n"
        b"last,c,d,qa\r\n"
    )
    assert load_rows(dataset_name=str(path)) == LoadedRows(
        [single_turn('Say "a",\nthen b', "", "a b", "qa"), single_turn("last", "c", "d", "qa")],
        [
            SkippedRow(f"{path}:row 2", "has 2 of 4 fields"),
            SkippedRow(f"{path}:row 3", "'response' is not valid UTF-8"),
            SkippedRow(f"{path}:row 4", "'response' is empty"),
        ],
    )


def test_parquet_with_broken_rows(tmp_path: Path) -> None:
    invalid = pyarrow.array([b"a", b"b", b"\xff", b"d"]).view(pyarrow.string())
    path = write_parquet(
        tmp_path / "rows.parquet", question=invalid, answer=[1, None, 3, 4], unused=[[0.0]] * 4
    )
    assert load_rows(dataset_name=path) == LoadedRows(
        [single_turn("a", "", "1", "all"), single_turn("d", "", "4", "all")],
        [
            SkippedRow(f"{path}:row 2", "'answer' is missing"),
            SkippedRow(f"{path}:row 3", "not valid UTF-8"),
        ],
    )


@settings(max_examples=MANY // 2, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(noise=st.lists(st.binary(max_size=40) | st.text('{}[]":,a\n', max_size=20).map(str.encode)))
@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_noise_between_rows_is_skipped_or_refused(tmp_path: Path, suffix: str, noise: list[bytes]) -> None:
    path = tmp_path / f"noise{suffix}"
    path.write_bytes(b"instruction,response\n" + b"\n".join(noise))
    try:
        loaded = load_rows(dataset_name=str(path))
    except UserError:
        return
    assert all(row.turns[0].content.strip() and row.response.strip() for row in loaded.rows)


def test_files_without_a_usable_row(tmp_path: Path) -> None:
    empty, array = tmp_path / "empty.jsonl", tmp_path / "array.jsonl"
    empty.write_bytes(b"")
    array.write_text("[\n{}\n]\n", encoding="utf-8")
    header = tmp_path / "header.csv"
    header.write_text("instruction,response\n", encoding="utf-8")
    assert refusal(dataset_name=str(empty)) == f"{empty}: no usable row (0 skipped)"
    assert refusal(dataset_name=str(header)) == f"{header}: no usable row (0 skipped)"
    assert (
        refusal(dataset_name=str(array))
        == f"{array}: no usable row (1 skipped; the first, {array}:row 1: 'instruction' is missing)"
    )


def test_hub_rows_of_the_split_and_configuration_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str | None, str]] = []

    def load_dataset(name: str, config: str | None, split: str) -> datasets.Dataset:
        asked.append((name, config, split))
        return datasets.Dataset.from_list([DOLLY, DOLLY | {"response": None}])

    monkeypatch.setattr(huggingface_hub, "is_offline_mode", lambda: True)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    loaded = load_rows(dataset_name="owner/name", dataset_config_name="main", split="test")
    assert asked == [("owner/name", "main", "test")]
    assert loaded.rows == [DOLLY_ROW]
    assert loaded.skipped == [SkippedRow("owner/name[test]:row 2", "'response' is missing")]


# Columns


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (("instruction", "input", "output"), single_turn("A", "B", "C", "all")),
        (("output", "instruction"), single_turn("B", "", "A", "all")),
        (("instruction", "context", "response"), single_turn("A", "B", "C", "all")),
        (("question", "answer", "category"), single_turn("A", "", "B", "C")),
        (("question", "context", "answer"), single_turn("A", "B", "C", "all")),
        (("prompt", "completion", "id"), single_turn("A", "", "B", "all")),
        # Columns of several layouts.
        (("instruction", "input", "response"), single_turn("A", "B", "C", "all")),
        (("instruction", "context", "output"), single_turn("A", "B", "C", "all")),
        (("question", "input", "output", "url"), single_turn("A", "B", "C", "all")),
        (("prompt", "response"), single_turn("A", "", "B", "all")),
        # Two layouts have their columns: the one with its context wins.
        (("instruction", "output", "context", "response"), single_turn("A", "C", "D", "all")),
    ],
)
def test_recognised_columns(tmp_path: Path, columns: tuple[str, ...], expected: Conversation) -> None:
    name = write_jsonl(tmp_path / "rows.jsonl", dict(zip(columns, "ABCD", strict=False)))
    assert load_rows(dataset_name=name).rows == [expected]


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        (("instruction", "input", "response"), "columns read: 'instruction', 'input' as context, 'response'"),
        (
            ("question", "answer", "id", "\x1burl"),
            "columns read: 'question' as instruction, 'answer' as response; ignored: 'id', '\\x1burl'",
        ),
    ],
)
def test_the_columns_that_are_read_and_those_that_are_not_are_said(
    tmp_path: Path, columns: tuple[str, ...], words: str
) -> None:
    name = write_jsonl(tmp_path / "rows.jsonl", dict(zip(columns, "ABCD", strict=False)))
    assert load_rows(dataset_name=name).columns == words


def test_columns_named_by_the_user_win(tmp_path: Path) -> None:
    name = write_jsonl(
        tmp_path / "rows.jsonl",
        {"context": "Q", "instruction": "I", "out": "A", "topic": "T", "category": "C"},
    )
    rows = load_rows(
        dataset_name=name, instruction_field="context", response_field="out", category_field="topic"
    ).rows
    # `context` is taken as the instruction, so it is not the context as well.
    assert rows == [single_turn("Q", "", "A", "T")]
    rows = load_rows(dataset_name=name, context_field="topic", response_field="out").rows
    assert rows == [single_turn("I", "T", "A", "C")]


def test_unknown_column_names_the_nearest(tmp_path: Path) -> None:
    name = write_jsonl(tmp_path / "rows.jsonl", {"question": "a", "reply": "b"})
    assert refusal(dataset_name=name, response_field="repply") == (
        f"data.response_field = 'repply': {name} has no such column; "
        "the nearest is 'reply' of 'question', 'reply'"
    )


def test_unrecognised_columns_name_the_keys_to_set(tmp_path: Path) -> None:
    name = write_jsonl(tmp_path / "rows.jsonl", {"q": "a", "reply": "b"})
    assert refusal(dataset_name=name) == (
        f"{name}: no column recognised as instruction and response among 'q', 'reply'; "
        "name it with data.instruction_field and data.response_field, or whole conversations with "
        "data.messages_field"
    )
    assert refusal(dataset_name=name, instruction_field="q") == (
        f"{name}: no column recognised as response among 'q', 'reply'; name it with data.response_field"
    )


def test_a_column_that_occurs_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("question,answer,answer\na,b,c\n", encoding="utf-8")
    assert refusal(dataset_name=str(path)) == f"{path}: column 'answer' occurs more than once"


# Sample and held-out rows


def numbered(counts: dict[str, int]) -> list[Conversation]:
    rows = [single_turn(f"{name} {n}", "", "x", name) for name, count in counts.items() for n in range(count)]
    random.Random(0).shuffle(rows)
    return rows


def test_sample_is_seeded_and_in_order() -> None:
    rows = numbered({"a": 50})
    sample = sample_rows(rows, 20, seed=3)
    assert len(set(sample)) == 20
    assert [row for row in rows if row in sample] == sample
    assert sample == sample_rows(rows, 20, seed=3) != sample_rows(rows, 20, seed=4)
    assert sample_rows(rows, 0, seed=3) == sample_rows(rows, 50, seed=3) == rows


def test_held_out_rows_by_hand() -> None:
    rows = numbered({"many": 100, "some": 30, "few": 9, "two": 2, "one": 1})
    train, held_out = split_held_out(rows, 10, seed=0)
    assert Counter(row.category for row in held_out) == {"many": 10, "some": 6, "few": 1, "two": 1}
    assert [row for row in rows if row not in held_out] == train
    assert [row for row in rows if row in held_out] == held_out
    assert (train, held_out) == split_held_out(rows, 10, seed=0)
    assert held_out != split_held_out(rows, 10, seed=1)[1]


def test_copies_of_a_row_are_not_held_out_apart() -> None:
    copies = [single_turn("same", "", "x", "a")] * 8 + [single_turn("same", "", "x", "b")] * 2
    others = numbered({"a": 2, "b": 8})
    for seed in range(20):
        train, held_out = split_held_out(copies + others, 5, seed)
        # 8 of 10 rows of `a` are more than a fifth, so the copies stay; two others are free.
        assert Counter(row.category for row in held_out) == {"a": 2, "b": 2}
        assert not {row.turns[0].content for row in train} & {row.turns[0].content for row in held_out}


@given(
    st.lists(st.tuples(st.integers(0, 12), st.sampled_from("abc")), max_size=80),
    st.integers(0, 6),
    st.integers(0, 99),
)
def test_held_out_properties(drawn: list[tuple[int, str]], per_category: int, seed: int) -> None:
    rows = [single_turn(str(number), "", "x", name) for number, name in drawn]
    train, held_out = split_held_out(rows, per_category, seed)
    assert Counter(train) + Counter(held_out) == Counter(rows)
    assert not {row.turns[0].content for row in train} & {row.turns[0].content for row in held_out}
    sizes = Counter(row.category for row in rows)
    for category, held in Counter(row.category for row in held_out).items():
        assert sizes[category] >= 2
        assert held <= min(per_category, max(1, sizes[category] // 5))
