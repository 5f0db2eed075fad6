"""Read raw rows from a local file or from a data set on the Hugging Face hub, one by one.

A .json or .jsonl file has a row on each line, or one array of all rows. An empty line is not a row. A row
that cannot be read has a reason in place of its fields. A UserError is raised only if the source as a whole
cannot be read.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from fedflame.config.sections import SKILLS
from fedflame.errors import UserError
from fedflame.reading import LONGEST_JSON, parse_json, shown

SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".csv", ".parquet")
HUB_TIMEOUT_SECONDS = 10.0
IN_MEMORY = "in-memory"
"""The value of `data.dataset_name` for rows that a program passes in, which are in no file."""

RawRow = tuple[str, dict[str, object] | str]
"""A row as read: its place, and its fields or the reason why it cannot be read."""


@dataclass(frozen=True)
class Source:
    """A file or data set whose columns are known. `rows` reads its rows."""

    name: str
    columns: list[str]
    rows: Callable[[Sequence[str]], Iterator[RawRow]]
    """Yields the rows, with at least the columns asked for."""


def open_source(
    dataset_name: str, dataset_config_name: str, split: str, key: str = "data.dataset_name"
) -> Source:
    """Open the source of that name.

    Args:
        dataset_name: a file if it ends in one of `SUFFIXES`, exists, or starts with `./`, `../`
            or `/`; otherwise a hub id.
        dataset_config_name: configuration of a hub data set that has several; empty for its default.
        split: split of a hub data set.
        key: the setting that names it, for messages.

    Raises:
        UserError: the source cannot be read. For a file, this may show only when its rows are read.
    """
    if dataset_name == IN_MEMORY:
        raise UserError(
            f"{key} = {IN_MEMORY!r}: a program passed these rows in; it must do so again, or {key} must "
            "name a file or a hub id"
        )
    refuse_missing_file(dataset_name, key)
    got = f"{key} = {dataset_name!r}"
    if _is_file(dataset_name):
        return _open_file(dataset_name, got)
    return _open_hub(dataset_name, dataset_config_name, split, got)


def hub_id(dataset_name: str) -> str:
    """Return the name if it is that of a data set on the hub (see `open_source`), else nothing."""
    elsewhere = dataset_name in (SKILLS, IN_MEMORY) or _is_file(dataset_name)
    return "" if elsewhere or "/" not in dataset_name else dataset_name


def refuse_missing_file(dataset_name: str, key: str = "data.dataset_name") -> None:
    """Raise UserError if the name is that of a file (see `open_source`) and there is no such file."""
    if _is_file(dataset_name) and not os.path.exists(dataset_name):
        raise UserError(f"{key} = {dataset_name!r}: no such file")


def _is_file(name: str) -> bool:
    return name.lower().endswith(SUFFIXES) or name.startswith(("./", "../", "/")) or os.path.exists(name)


def _open_file(name: str, got: str) -> Source:
    """Open a file; messages begin with what was `got`: the setting and its value."""
    path = Path(name)
    if path.is_dir() or not name.lower().endswith(SUFFIXES):
        kind = "a folder" if path.is_dir() else "not a known kind of file"
        raise UserError(f"{got}: {kind}; must be a file in {', '.join(SUFFIXES)}")
    if name.lower().endswith(".csv"):
        return Source(name, _csv_header(path, got), lambda _: _csv_rows(path, got))
    if name.lower().endswith(".parquet"):
        return Source(name, _parquet_columns(path, got), lambda columns: _parquet_rows(path, columns, got))
    # The first pass collects only the names of columns: a column may first occur in the last row.
    keys = {key: None for _, fields in _json_rows(path, got) if isinstance(fields, dict) for key in fields}
    return Source(name, list(keys), lambda _: _json_rows(path, got))


@contextmanager
def _reading(got: str, *more: type[Exception]) -> Iterator[None]:
    """Turn errors of reading a file into a UserError."""
    unreadable: tuple[type[Exception], ...] = (OSError, EOFError, zlib.error, csv.Error, *more)
    try:
        yield
    except unreadable as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or _first_line(error)
        raise UserError(f"{got}: cannot be read: {reason}") from error


def _json_rows(path: Path, got: str) -> Iterator[RawRow]:
    """Yield the objects of an array if the file is one, else those of its lines.

    Raises:
        UserError: it is an array that is too large, or one object that is no row.
    """
    with _reading(got), gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb") as file:
        start = file.readline(LONGEST_JSON + 1)
        while start and not start.removeprefix(codecs.BOM_UTF8).strip():
            start = file.readline(LONGEST_JSON + 1)
        file.seek(0)
        whole = _whole(path.name, got, file, start.removeprefix(codecs.BOM_UTF8).lstrip())
        if whole is not None:
            for number, value in enumerate(whole, start=1):
                yield f"{path}:row {number}", value if isinstance(value, dict) else "not a JSON object"
            return
        file.seek(0)
        for number, line in enumerate(_lines(file), start=1):
            if line.strip():
                yield f"{path}:{number}", _json_object(line)


def _whole(name: str, got: str, file: gzip.GzipFile | IO[bytes], start: bytes) -> list[Any] | None:
    """Return the items of a file that is one JSON array, or None if its lines are to be read.

    `start` is its first line that is not empty.
    """
    opens = start[:1]
    if opens not in (b"[", b"{") or (opens == b"{" and isinstance(_json_object(start), dict)):
        return None
    content = file.read(LONGEST_JSON + 1)
    try:
        value = parse_json(content, bare_words=True)
    except ValueError as error:
        if opens == b"{" or not isinstance(_json_value(start), str):
            return None
        too_long = len(content) > LONGEST_JSON
        advice = f"; write one row on each line (jq -c '.[]' {name} > rows.jsonl)" if too_long else ""
        raise UserError(f"{got}: a JSON array that is {error}{advice}") from error
    if isinstance(value, dict):
        raise UserError(
            f"{got}: is one JSON object with {_keys(value)}; it must be an array "
            "of rows, or have one row on each line"
        )
    return value if isinstance(value, list) else None


def _keys(value: dict[str, Any]) -> str:
    return ", ".join(shown(key, 30) for key in list(value)[:5]) or "no keys"


def _lines(file: gzip.GzipFile | IO[bytes]) -> Iterator[bytes]:
    """Yield the lines of a file; of one that is too long to read, its beginning and one byte too much."""
    while line := file.readline(LONGEST_JSON + 1):
        yield line
        while len(line) > LONGEST_JSON and not line.endswith(b"\n"):
            line = file.readline(LONGEST_JSON + 1)


def _json_object(line: bytes) -> dict[str, object] | str:
    value = _json_value(line)
    return value if isinstance(value, dict | str) else "not a JSON object"


def _json_value(line: bytes) -> dict[str, object] | list[object] | str:
    """Return the object or array on a line, or why there is none."""
    if len(line) > LONGEST_JSON:
        return f"longer than {LONGEST_JSON:,} bytes"
    try:
        value = parse_json(line, bare_words=True)
    except ValueError as error:
        return "not valid UTF-8" if isinstance(error.__cause__, UnicodeDecodeError) else "not valid JSON"
    return value if isinstance(value, dict | list) else "not a JSON object"


def _csv_header(path: Path, got: str) -> list[str]:
    with _reading(got), path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        return next(csv.reader(file), [])


def _csv_rows(path: Path, got: str) -> Iterator[RawRow]:
    # surrogateescape keeps invalid UTF-8 in its field, where `instructions` finds it.
    with _reading(got), path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file)
        header = next(reader, [])
        for number, cells in enumerate(filter(None, reader), start=1):
            matches = len(cells) == len(header)
            fields: dict[str, object] = dict(zip(header, cells, strict=False))
            yield f"{path}:row {number}", fields if matches else f"has {len(cells)} of {len(header)} fields"


def _parquet_columns(path: Path, got: str) -> list[str]:
    import pyarrow  # type: ignore[import-untyped, unused-ignore]
    import pyarrow.parquet  # type: ignore[import-untyped, unused-ignore]

    with _reading(got, pyarrow.ArrowException):
        return list(pyarrow.parquet.read_schema(path).names)


def _parquet_rows(path: Path, columns: Sequence[str], got: str) -> Iterator[RawRow]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    with _reading(got, pyarrow.ArrowException), pyarrow.parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(columns=list(columns)):
            for index in range(batch.num_rows):
                number += 1
                try:
                    fields = {name: batch.column(name)[index].as_py() for name in columns}
                except UnicodeDecodeError:  # pyarrow checks text only here
                    yield f"{path}:row {number}", "not valid UTF-8"
                else:
                    yield f"{path}:row {number}", fields


def _open_hub(name: str, config_name: str, split: str, got: str) -> Source:
    import datasets  # type: ignore[import-untyped, unused-ignore]

    with _quiet():
        _ask_hub(name, got)
        try:
            dataset = datasets.load_dataset(name, config_name or None, split=split)
        except Exception as error:  # of datasets, fsspec, pyarrow or the HTTP library beneath
            raise UserError(
                f"{got}, split {split!r}: cannot be loaded from the Hugging Face hub: {_first_line(error)}"
            ) from error

    def rows(columns: Sequence[str]) -> Iterator[RawRow]:
        for number, fields in enumerate(dataset.select_columns(list(columns)), start=1):
            yield f"{name}[{split}]:row {number}", fields

    return Source(f"{name}[{split}]", list(dataset.column_names), rows)


def _ask_hub(name: str, got: str) -> None:
    """Ask the hub once for the data set, because `datasets` would retry an unreachable hub for 30 seconds."""
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    if huggingface_hub.is_offline_mode():  # `datasets` then uses only its cache
        return
    try:
        huggingface_hub.HfApi().dataset_info(name, timeout=HUB_TIMEOUT_SECONDS)
    except HFValidationError as error:
        allowed = ", ".join(SUFFIXES)
        raise UserError(f"{got}: neither a file ({allowed}) nor a hub id (owner/name)") from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"{got}: no such file, and no such data set on the hub (or it needs HF_TOKEN)"
        ) from error
    except Exception as error:  # the HTTP library, and so its errors, differ between versions
        raise UserError(
            f"{got}: no such file, and the Hugging Face hub cannot be reached ({_first_line(error)}); "
            "HF_HUB_OFFLINE=1 takes a data set that is in the cache"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Switch off progress bars and warnings of the hub libraries within the block."""
    import datasets
    import huggingface_hub

    loggings = (datasets.logging, huggingface_hub.logging)
    before = [logging.get_verbosity() for logging in loggings]
    bars = not datasets.are_progress_bars_disabled()
    for logging in loggings:
        logging.set_verbosity_error()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        for logging, verbosity in zip(loggings, before, strict=True):
            logging.set_verbosity(verbosity)
        if bars:
            datasets.enable_progress_bars()


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
