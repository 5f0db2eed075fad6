"""Rows that a program passes in instead of a file: one collection, or one for each client."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedflame.config.client_files import client_files
from fedflame.data.sources import RawRow, Source, open_source
from fedflame.errors import UserError, one_line

_ALLOWED = "a datasets.Dataset, a list of dicts, or a list with one of these for each client"


@dataclass(frozen=True)
class GivenRows:
    """Rows as sources, which are read like those of files."""

    sources: tuple[Source, ...]
    per_client: bool
    """Whether each source holds the rows of one client, in client order. If not, there is one source."""
    names: tuple[str, ...] = ()
    """Of the clients, if they have names."""


def rows_of_files(patterns: Sequence[str]) -> GivenRows:
    """Return the rows of `data.client_files`, each file a client of its name; see `client_files`."""
    files = client_files(patterns)
    names = [one_line(Path(file).name.split(".")[0]) for file in files]
    if len(set(names)) < len(names):
        names = [one_line(file) for file in files]
    return GivenRows(
        tuple(open_source(file, "", "", "data.client_files") for file in files),
        per_client=True,
        names=tuple(names),
    )


def rows_of_test_files(patterns: Sequence[str], training: Sequence[str]) -> tuple[Source, ...]:
    """Return the rows of `data.client_test_files`, in client order.

    Args:
        patterns: those of `data.client_test_files`.
        training: those of `data.client_files`.

    Raises:
        UserError: see `client_files`; there is not one file for each client, or it is one of the others.
    """
    key = "data.client_test_files"
    files, trained = client_files(patterns, key), client_files(training)
    if both := sorted(set(files) & set(trained)):
        raise UserError(f"{key}: {both[0]} is in data.client_files, too; nobody may train on what is scored")
    if len(files) != len(trained):
        raise UserError(
            f"{key}: {len(files)} files for the {len(trained)} of data.client_files; each client needs one"
        )
    return tuple(open_source(file, "", "") for file in files)


def given_rows(data: Any) -> GivenRows:
    """Turn rows that a program passes in into sources.

    Args:
        data: a `datasets.Dataset`, a list of dicts, or a list with one of these for each client.

    Raises:
        UserError: `data` is none of these, or is empty.
    """
    if _is_table(data) or _is_list_of_dicts(data):
        return GivenRows((_source("data", data),), per_client=False)
    if not isinstance(data, Sequence) or isinstance(data, str | bytes):
        raise UserError(f"data: got {type(data).__name__}; it must be {_ALLOWED}")
    if not data:
        raise UserError(f"data: got an empty list; it must be {_ALLOWED}")
    for client, rows in enumerate(data):
        if not (_is_table(rows) or _is_list_of_dicts(rows)):
            got = "an empty list" if isinstance(rows, list) and not rows else type(rows).__name__
            raise UserError(f"data[{client}]: got {got}; it must be a datasets.Dataset or a list of dicts")
    return GivenRows(
        tuple(_source(f"data[{client}]", rows) for client, rows in enumerate(data)), per_client=True
    )


def _is_table(data: Any) -> bool:
    """Return whether this is a `datasets.Dataset`, without importing `datasets`."""
    return hasattr(data, "column_names") and isinstance(data, Iterable)


def _is_list_of_dicts(data: Any) -> bool:
    listed = isinstance(data, Sequence) and not isinstance(data, str | bytes)
    return listed and len(data) > 0 and isinstance(data[0], Mapping)


def _source(name: str, rows: Any) -> Source:
    def read(columns: Sequence[str]) -> Iterator[RawRow]:
        for number, row in enumerate(rows, start=1):
            yield f"{name}:row {number}", dict(row) if isinstance(row, Mapping) else "not a dict"

    if _is_table(rows):
        return Source(name, list(rows.column_names), read)
    keys = {str(key): None for row in rows if isinstance(row, Mapping) for key in row}
    return Source(name, list(keys), read)
