"""Instruction rows: from a local file or a hub id, to one typed form.

A row that cannot be used is skipped and recorded with its place and reason; only a source that
cannot be read at all, or holds no usable row, ends in a UserError.
"""

from __future__ import annotations

import csv
import difflib
import gzip
import json
import math
import os
import random
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fedflame.errors import UserError

SUFFIXES = (".jsonl", ".jsonl.gz", ".csv", ".parquet")
LAYOUTS = (
    {"instruction": "instruction", "context": "input", "response": "output"},  # Alpaca
    {"instruction": "instruction", "context": "context", "response": "response"},  # Dolly
    {"instruction": "question", "context": "context", "response": "answer"},
    {"instruction": "prompt", "context": "context", "response": "completion"},
)
HUB_TIMEOUT_SECONDS = 10.0


@dataclass(frozen=True)
class Instruction:
    """One task and its answer; `context` may be empty, `category` is the label for partitions."""

    instruction: str
    context: str
    response: str
    category: str


@dataclass(frozen=True)
class SkippedRow:
    """A row that could not be used: its place, such as `rows.jsonl:7`, and why."""

    where: str
    reason: str


@dataclass(frozen=True)
class LoadedInstructions:
    """The usable rows of a source in their order, and the rows that were left out."""

    rows: list[Instruction]
    skipped: list[SkippedRow]


class _BrokenRowError(Exception):
    """One row cannot be used; the message is the reason."""


# A row as read: its place, and its fields or the reason why it has none.
_RawRow = tuple[str, dict[str, object] | str]


@dataclass(frozen=True)
class _Source:
    name: str
    columns: list[str]
    rows: Callable[[Sequence[str]], Iterator[_RawRow]]
    """The rows, with at least the columns asked for."""


def load_instructions(
    *,
    dataset_name: str,
    split: str = "train",
    dataset_config_name: str = "",
    instruction_field: str = "",
    context_field: str = "",
    response_field: str = "",
    category_field: str = "",
) -> LoadedInstructions:
    """Instruction rows of a local file or of a data set on the Hugging Face hub.

    Args:
        dataset_name: a file if it ends in one of `SUFFIXES`, exists, or starts with `./`, `../`
            or `/`; otherwise a hub id.
        split: split of a hub data set.
        dataset_config_name: configuration of a hub data set that has several; empty for its default.
        instruction_field: column of the instruction; empty to recognise `LAYOUTS`.
        context_field: likewise of the context, which a row may lack.
        response_field: likewise of the response.
        category_field: column of the category; empty takes `category`, or `"all"` without one.

    Raises:
        UserError: the source cannot be read, its columns are not known, or no row is usable.
    """
    given = {
        "instruction": instruction_field,
        "context": context_field,
        "response": response_field,
        "category": category_field,
    }
    source = (
        _open_file(dataset_name)
        if _is_file(dataset_name)
        else _open_hub(dataset_name, dataset_config_name, split)
    )
    columns = _resolve_columns(source, given)
    rows: list[Instruction] = []
    skipped: list[SkippedRow] = []
    for where, fields in source.rows(sorted(set(columns.values()))):
        try:
            rows.append(_instruction(fields, columns))
        except _BrokenRowError as error:
            skipped.append(SkippedRow(where, str(error)))
    if not rows:
        first = f"; the first, {skipped[0].where}: {skipped[0].reason}" if skipped else ""
        raise UserError(f"{source.name}: no usable row ({len(skipped)} skipped{first})")
    return LoadedInstructions(rows, skipped)


def sample_rows(rows: Sequence[Instruction], max_rows: int, seed: int) -> list[Instruction]:
    """A seeded sample of at most `max_rows` rows in their order; 0 takes all."""
    if max_rows == 0 or max_rows >= len(rows):
        return list(rows)
    chosen = random.Random(f"fedflame-sample-{seed}").sample(range(len(rows)), max_rows)
    return [rows[index] for index in sorted(chosen)]


def split_held_out(
    rows: Sequence[Instruction], rows_per_category: int, seed: int
) -> tuple[list[Instruction], list[Instruction]]:
    """Rows to train on and rows to evaluate on, both in their order.

    Of each category up to `rows_per_category` rows are held out, but no more than a fifth of them,
    and one of two to nine rows. Copies of a row (same instruction, context and response, whatever
    the category) stay on one side; so a category in which every row has more copies than may be
    held out has none.
    """
    room = {
        category: min(rows_per_category, max(count // 5, 1 if count >= 2 else 0))
        for category, count in Counter(row.category for row in rows).items()
    }
    copies: dict[tuple[str, str, str], list[int]] = {}
    for index, row in enumerate(rows):
        copies.setdefault((row.instruction, row.context, row.response), []).append(index)
    groups = list(copies.values())
    random.Random(f"fedflame-held-out-{seed}").shuffle(groups)
    held: set[int] = set()
    for group in groups:
        needed = Counter(rows[index].category for index in group)
        if all(count <= room[category] for category, count in needed.items()):
            held.update(group)
            for category, count in needed.items():
                room[category] -= count
    train = [row for index, row in enumerate(rows) if index not in held]
    return train, [rows[index] for index in sorted(held)]


def _instruction(fields: dict[str, object] | str, columns: dict[str, str]) -> Instruction:
    if isinstance(fields, str):
        raise _BrokenRowError(fields)
    has_context = "context" in columns and fields.get(columns["context"]) is not None
    return Instruction(
        instruction=_filled(fields, columns["instruction"]),
        context=_text(fields, columns["context"]) if has_context else "",
        response=_filled(fields, columns["response"]),
        category=_filled(fields, columns["category"]) if "category" in columns else "all",
    )


def _filled(fields: dict[str, object], column: str) -> str:
    text = _text(fields, column)
    if not text.strip():
        raise _BrokenRowError(f"{column!r} is empty")
    return text


def _text(fields: dict[str, object], column: str) -> str:
    value = fields.get(column)
    if value is None:
        raise _BrokenRowError(f"{column!r} is missing")
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise _BrokenRowError(f"{column!r} is of type {type(value).__name__}, not text")
    if isinstance(value, float) and not math.isfinite(value):
        raise _BrokenRowError(f"{column!r} is {value}, not text")
    text = str(value)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise _BrokenRowError(f"{column!r} is not valid UTF-8") from None
    return text


def _resolve_columns(source: _Source, given: dict[str, str]) -> dict[str, str]:
    """The column of each role, those named by the user first; context and category may have none."""
    chosen = {role: column for role, column in given.items() if column}
    if not source.columns:  # nothing to match: the rows, if there are any, tell what is wrong
        return LAYOUTS[0] | chosen
    for role, column in chosen.items():
        if column not in source.columns:
            nearest = difflib.get_close_matches(column, source.columns, n=1, cutoff=0.0)[0]
            raise UserError(
                f"data.{role}_field = {column!r}: {source.name} has no such column; "
                f"the nearest is {nearest!r} of {_listed(source.columns)}"
            )
    free = [column for column in source.columns if column not in chosen.values()]
    for role, column in _recognised(source, free, chosen).items():
        if column in free:
            chosen.setdefault(role, column)
    for column in chosen.values():
        if source.columns.count(column) > 1:
            raise UserError(f"{source.name}: column {column!r} occurs more than once")
    return chosen


def _recognised(source: _Source, free: Sequence[str], chosen: dict[str, str]) -> dict[str, str]:
    """The first layout that has the columns still wanted, one with its context column if any."""
    wanted = [role for role in ("instruction", "response") if role not in chosen]
    layouts = [layout for layout in LAYOUTS if all(layout[role] in free for role in wanted)]
    if not layouts:
        keys = " and ".join(f"data.{role}_field" for role in wanted)
        raise UserError(
            f"{source.name}: no column recognised as {' and '.join(wanted)} "
            f"among {_listed(source.columns)}; name it with {keys}"
        )
    best = max(layouts, key=lambda layout: layout["context"] in free)
    return best | {"category": "category"}


def _listed(columns: Sequence[str]) -> str:
    shown = ", ".join(repr(column) for column in columns[:20])
    return shown + (f" and {len(columns) - 20} more" if len(columns) > 20 else "")


def _is_file(name: str) -> bool:
    return name.lower().endswith(SUFFIXES) or name.startswith(("./", "../", "/")) or os.path.exists(name)


def _open_file(name: str) -> _Source:
    path = Path(name)
    if not os.path.exists(name):
        raise UserError(f"data.dataset_name = {name!r}: no such file")
    if path.is_dir() or not name.lower().endswith(SUFFIXES):
        got = "a folder" if path.is_dir() else "not a known kind of file"
        raise UserError(f"data.dataset_name = {name!r}: {got}; must be a file in {', '.join(SUFFIXES)}")
    if name.lower().endswith(".csv"):
        return _Source(name, _csv_header(path), lambda _: _csv_rows(path))
    if name.lower().endswith(".parquet"):
        return _Source(name, _parquet_columns(path), lambda columns: _parquet_rows(path, columns))
    # The first reading is for the names alone: a column may first occur in the last row.
    keys = {key: None for _, fields in _jsonl_rows(path) if isinstance(fields, dict) for key in fields}
    return _Source(name, list(keys), lambda _: _jsonl_rows(path))


@contextmanager
def _reading(path: Path, *more: type[Exception]) -> Iterator[None]:
    """Turns the errors of a file that cannot be read as a whole into a UserError."""
    unreadable: tuple[type[Exception], ...] = (OSError, EOFError, zlib.error, csv.Error, *more)
    try:
        yield
    except unreadable as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or _first_line(error)
        raise UserError(f"data.dataset_name = {str(path)!r}: cannot be read: {reason}") from error


def _jsonl_rows(path: Path) -> Iterator[_RawRow]:
    with _reading(path), gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield f"{path}:{number}", _json_object(line)


def _json_object(line: bytes) -> dict[str, object] | str:
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return "not valid UTF-8"
    except (ValueError, RecursionError):
        return "not valid JSON"
    return value if isinstance(value, dict) else "not a JSON object"


def _csv_header(path: Path) -> list[str]:
    with _reading(path), path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        return next(csv.reader(file), [])


def _csv_rows(path: Path) -> Iterator[_RawRow]:
    # surrogateescape keeps bytes that are not UTF-8 to their own field, where they are found later.
    with _reading(path), path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file)
        header = next(reader, [])
        for number, cells in enumerate(filter(None, reader), start=1):
            matches = len(cells) == len(header)
            fields: dict[str, object] = dict(zip(header, cells, strict=False))
            yield f"{path}:row {number}", fields if matches else f"has {len(cells)} of {len(header)} fields"


def _parquet_columns(path: Path) -> list[str]:
    import pyarrow  # type: ignore[import-untyped, unused-ignore]
    import pyarrow.parquet  # type: ignore[import-untyped, unused-ignore]

    with _reading(path, pyarrow.ArrowException):
        return list(pyarrow.parquet.read_schema(path).names)


def _parquet_rows(path: Path, columns: Sequence[str]) -> Iterator[_RawRow]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    with _reading(path, pyarrow.ArrowException), pyarrow.parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(columns=list(columns)):
            for index in range(batch.num_rows):
                number += 1
                try:
                    fields = {name: batch.column(name)[index].as_py() for name in columns}
                except UnicodeDecodeError:  # pyarrow does not check text before it is asked for
                    yield f"{path}:row {number}", "not valid UTF-8"
                else:
                    yield f"{path}:row {number}", fields


def _open_hub(name: str, config_name: str, split: str) -> _Source:
    import datasets  # type: ignore[import-untyped, unused-ignore]

    with _quiet():
        _ask_hub(name)
        try:
            dataset = datasets.load_dataset(name, config_name or None, split=split)
        except Exception as error:  # of datasets, fsspec, pyarrow or the HTTP library beneath
            raise UserError(
                f"data.dataset_name = {name!r}, data.split = {split!r}: "
                f"cannot be loaded from the Hugging Face hub: {_first_line(error)}"
            ) from error

    def rows(columns: Sequence[str]) -> Iterator[_RawRow]:
        for number, fields in enumerate(dataset.select_columns(list(columns)), start=1):
            yield f"{name}[{split}]:row {number}", fields

    return _Source(f"{name}[{split}]", list(dataset.column_names), rows)


def _ask_hub(name: str) -> None:
    """One request, because `datasets` would retry an unreachable hub for half a minute."""
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    if huggingface_hub.is_offline_mode():  # then datasets goes straight to its cache
        return
    got = f"data.dataset_name = {name!r}: "
    try:
        huggingface_hub.HfApi().dataset_info(name, timeout=HUB_TIMEOUT_SECONDS)
    except HFValidationError as error:
        allowed = ", ".join(SUFFIXES)
        raise UserError(f"{got}neither a file ({allowed}) nor a hub id (owner/name)") from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"{got}no such file, and no such data set on the hub (or it needs HF_TOKEN)"
        ) from error
    except Exception as error:  # the HTTP library, and so its errors, differ between versions
        raise UserError(
            f"{got}no such file, and the Hugging Face hub cannot be reached ({_first_line(error)}); "
            "HF_HUB_OFFLINE=1 takes a data set that is in the cache"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and warnings of the hub libraries."""
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
