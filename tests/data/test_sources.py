"""What each kind of file gives row by row, and every source that is refused as a whole."""

from __future__ import annotations

import gzip
import json
import random
import time
from pathlib import Path

import datasets
import huggingface_hub
import pyarrow  # type: ignore[import-untyped, unused-ignore]
import pyarrow.parquet  # type: ignore[import-untyped, unused-ignore]
import pytest
from tests.json_lines import write_lines
from tests.refusals import refusal_of

from fedflame import reading
from fedflame.data import sources
from fedflame.data.sources import RawRow, hub_id, open_source

DOLLY = {"instruction": "Name it.", "context": "A red fox.", "response": "fox", "category": "qa"}


def read(name: str | Path) -> tuple[list[str], list[RawRow]]:
    """The columns of a file or hub id and all its rows."""
    source = open_source(str(name), "", "train")
    return source.columns, list(source.rows(source.columns))


def refusal(name: str | Path) -> str:
    return refusal_of(read, name)


# Files


def test_jsonl_rows_that_are_no_object_come_with_the_reason(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    lines = [
        json.dumps(DOLLY).encode(),
        b'{"instruction": "cut',
        b"[1, 2]",
        b'{"instruction": "a", "response": "\xff", "category": "qa"}',
        b"[" * 100_000,
        b'{"instruction": 1, "context": null}\r',
    ]
    path.write_bytes(b"\n".join(lines))
    assert read(path)[1] == [
        (f"{path}:1", DOLLY),
        (f"{path}:2", "not valid JSON"),
        (f"{path}:3", "not a JSON object"),
        (f"{path}:4", "not valid UTF-8"),
        (f"{path}:5", "not valid JSON"),
        (f"{path}:6", {"instruction": 1, "context": None}),
    ]


def test_a_blank_line_of_jsonl_is_no_row_but_a_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\n{"a": 1}\n  \t\r\n{"a": 2}\n\n \n')
    assert read(path)[1] == [(f"{path}:2", {"a": 1}), (f"{path}:4", {"a": 2})]


def test_jsonl_columns_are_those_of_all_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"instruction": "a", "output": "b"}\n{"input": "d", "output": "e"}\n', encoding="utf-8")
    assert read(path)[0] == ["instruction", "output", "input"]


def test_jsonl_gz_is_read_like_jsonl(tmp_path: Path) -> None:
    path = tmp_path / "rows.JSONL.gz"
    with gzip.open(path, "wt", encoding="utf-8-sig") as file:
        file.write(json.dumps(DOLLY) + "\nbroken\n")
    assert read(path) == (list(DOLLY), [(f"{path}:1", DOLLY), (f"{path}:2", "not valid JSON")])


def test_csv_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(
        b"\xef\xbb\xbfinstruction,context,response\r\n"
        b'"Say ""a"",\nthen b",,a b\r\n'
        b"\r\n"
        b"short,row\r\n"
        b"one,too,ma,ny\r\n"
        b"last,c,d\r\n"
        b"\r\n"
    )
    assert read(path) == (
        ["instruction", "context", "response"],
        [
            (f"{path}:row 1", {"instruction": 'Say "a",\nthen b', "context": "", "response": "a b"}),
            (f"{path}:row 2", "has 2 of 3 fields"),
            (f"{path}:row 3", "has 4 of 3 fields"),
            (f"{path}:row 4", {"instruction": "last", "context": "c", "response": "d"}),
        ],
    )


def test_parquet_rows_have_the_columns_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    invalid = pyarrow.array([b"a", b"b", b"\xff", b"d"]).view(pyarrow.string())
    table = pyarrow.table({"question": invalid, "answer": [1, None, 3, 4], "unused": [[0.0]] * 4})
    pyarrow.parquet.write_table(table, path)
    source = open_source(str(path), "", "train")
    assert source.columns == ["question", "answer", "unused"]
    assert list(source.rows(["answer", "question"])) == [
        (f"{path}:row 1", {"question": "a", "answer": 1}),
        (f"{path}:row 2", {"question": "b", "answer": None}),
        (f"{path}:row 3", "not valid UTF-8"),
        (f"{path}:row 4", {"question": "d", "answer": 4}),
    ]


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".parquet"])
def test_a_damaged_file_is_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(b"this is neither gzip nor parquet")
    message = refusal(path)
    assert message.startswith(f"data.dataset_name = {str(path)!r}: cannot be read: ")


def test_a_gzip_file_cut_short_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    rows = "".join(
        json.dumps(DOLLY | {"response": str(random.Random(n).random())}) + "\n" for n in range(500)
    )
    whole = gzip.compress(rows.encode())
    path.write_bytes(whole[: len(whole) // 2])
    assert "cannot be read: Compressed file ended" in refusal(path)


def test_a_csv_field_beyond_the_limit_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(f"instruction,response\na,b\nc,{'x' * 200_000}\n", encoding="utf-8")
    assert "cannot be read: field larger than field limit" in refusal(path)


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    missing, unknown = tmp_path / "none.csv", tmp_path / "rows.txt"
    unknown.write_text("x", encoding="utf-8")
    kinds = "must be a file in .jsonl, .json, .jsonl.gz, .json.gz, .csv, .parquet"
    assert refusal(missing) == f"data.dataset_name = {str(missing)!r}: no such file"
    assert refusal("./none") == "data.dataset_name = './none': no such file"
    assert refusal(unknown) == f"data.dataset_name = {str(unknown)!r}: not a known kind of file; {kinds}"
    assert refusal(tmp_path) == f"data.dataset_name = {str(tmp_path)!r}: a folder; {kinds}"


# Hub


@pytest.fixture
def hub_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "is_offline_mode", lambda: False)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda self, name, timeout: None)


@pytest.mark.usefixtures("hub_answers")
def test_hub_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str | None, str]] = []

    def load_dataset(name: str, config: str | None, split: str) -> datasets.Dataset:
        asked.append((name, config, split))
        return datasets.Dataset.from_list([DOLLY, DOLLY | {"response": None}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = open_source("owner/name", "", "test")
    open_source("owner/name", "main", "test")
    assert asked == [("owner/name", None, "test"), ("owner/name", "main", "test")]
    assert (source.name, source.columns) == ("owner/name[test]", list(DOLLY))
    assert list(source.rows(["response", "context"])) == [
        ("owner/name[test]:row 1", {"response": "fox", "context": "A red fox."}),
        ("owner/name[test]:row 2", {"response": None, "context": "A red fox."}),
    ]


@pytest.mark.usefixtures("hub_answers")
@pytest.mark.parametrize("kind", [ConnectionError, ValueError, datasets.exceptions.DatasetGenerationError])
def test_hub_errors_are_one_line(monkeypatch: pytest.MonkeyPatch, kind: type[Exception]) -> None:
    def load_dataset(name: str, config: str | None, split: str) -> None:
        raise kind("Couldn't reach it\nmore")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert refusal("owner/name") == (
        "data.dataset_name = 'owner/name', split 'train': "
        "cannot be loaded from the Hugging Face hub: Couldn't reach it"
    )
    assert not datasets.are_progress_bars_disabled()


def test_unreachable_hub_is_refused_without_retries(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Against a port nobody listens on: the error is the real one of the HTTP library."""
    monkeypatch.setattr(huggingface_hub, "is_offline_mode", lambda: False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    started = time.monotonic()
    message = refusal("owner/name")
    assert time.monotonic() - started < 10  # datasets alone retries for 23 seconds
    assert message.startswith(
        "data.dataset_name = 'owner/name': no such file, and the Hugging Face hub cannot be reached ("
    )
    assert message.endswith("HF_HUB_OFFLINE=1 takes a data set that is in the cache")
    assert capfd.readouterr() == ("", "")


def test_offline_mode_without_a_cached_copy_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    message = refusal("fedflame-tests/no-such-data-set")
    assert "cannot be loaded from the Hugging Face hub: Couldn't reach" in message


@pytest.mark.parametrize("name", ["", "a/b/c", "we ird"])
def test_names_that_are_no_hub_id(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(huggingface_hub, "is_offline_mode", lambda: False)
    assert refusal(name) == (
        f"data.dataset_name = {name!r}: neither a file (.jsonl, .json, .jsonl.gz, .json.gz, .csv, .parquet) "
        "nor a hub id (owner/name)"
    )


# JSON arrays

ALPACA = [{"instruction": f"Say {n}", "input": "", "output": str(n)} for n in range(3)]


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.json.gz", "ROWS.JSON"])
@pytest.mark.parametrize("before", [b"", b"\xef\xbb\xbf", b"\n  \n"])
def test_an_array_of_rows_is_read_whatever_its_name(
    tmp_path: Path, name: str, indent: int | None, before: bytes
) -> None:
    content = before + json.dumps([*ALPACA, 7], indent=indent).encode()
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    source = open_source(str(path), "", "train")
    assert source.columns == ["instruction", "input", "output"]
    expected: list[RawRow] = [(f"{path}:row {n}", row) for n, row in enumerate(ALPACA, start=1)]
    assert list(source.rows(source.columns)) == [*expected, (f"{path}:row 4", "not a JSON object")]


def test_a_json_file_with_a_row_on_each_line_is_read(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.json", ALPACA)
    source = open_source(str(path), "", "train")
    assert [fields for _, fields in source.rows(source.columns)] == ALPACA


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('[{"instruction": "a"}, {', "a JSON array that is not JSON: "),
        (
            '{\n"version": 1,\n"data": [{}]\n}',
            "is one JSON object with 'version', 'data'; it must be an array",
        ),
        ("[" * 100_000, "a JSON array that is not JSON: nested too deep"),
    ],
)
def test_what_is_nearly_rows_is_refused_as_what_it_is(tmp_path: Path, content: str, reason: str) -> None:
    path = tmp_path / "rows.json"
    path.write_text(content)
    assert refusal(path).startswith(f"data.dataset_name = {str(path)!r}: {reason}")


def test_an_array_that_is_too_large_is_refused_with_a_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "LONGEST_JSON", 60)
    monkeypatch.setattr(reading, "LONGEST_JSON", 60)
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(ALPACA, indent=1))
    assert refusal(path) == (
        f"data.dataset_name = {str(path)!r}: a JSON array that is larger than 60 bytes; write one row on "
        "each line (jq -c '.[]' rows.json > rows.jsonl)"
    )


@pytest.mark.parametrize(
    ("name", "on_the_hub"),
    [
        ("owner/rows", True),
        ("skills", False),
        ("in-memory", False),
        ("rows.jsonl", False),
        ("a/rows.csv", False),
    ],
)
def test_only_a_data_set_of_the_hub_has_an_id_there(name: str, on_the_hub: bool) -> None:
    assert hub_id(name) == (name if on_the_hub else "")
