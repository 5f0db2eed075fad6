"""Read instruction rows from a source into one typed form, sample them, and hold some out.

A row that cannot be used is skipped and recorded with its place and the reason. A UserError is raised only if
the source cannot be read at all or has no usable row.
"""

from __future__ import annotations

import difflib
import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedflame.data.sources import Source, open_source
from fedflame.errors import UserError

LAYOUTS = (
    {"instruction": "instruction", "context": "input", "response": "output"},  # Alpaca
    {"instruction": "instruction", "context": "context", "response": "response"},  # Dolly
    {"instruction": "question", "context": "context", "response": "answer"},
    {"instruction": "prompt", "context": "context", "response": "completion"},
)


@dataclass(frozen=True)
class Instruction:
    """One task and its answer. `context` may be empty; `category` is the label for partitions."""

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
    """The usable rows of a source in their order, and the skipped rows."""

    rows: list[Instruction]
    skipped: list[SkippedRow]


_Content = tuple[str, str, str]


class _BrokenRowError(Exception):
    """One row cannot be used; the message is the reason."""


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
    """Load the instruction rows of a local file or of a data set on the Hugging Face hub.

    Args:
        dataset_name: a file or a hub id; see `open_source`.
        split: split of a hub data set.
        dataset_config_name: configuration of a hub data set that has several; empty for its default.
        instruction_field: column of the instruction; if empty, the names in `LAYOUTS` are recognised.
        context_field: column of the context, which a row may lack; recognised if empty.
        response_field: column of the response; recognised if empty.
        category_field: column of the category. If empty, the column `category` is used; without one, all rows
            have the category "all".

    Raises:
        UserError: the source cannot be read, its columns are not known, or no row is usable.
    """
    given = {
        "instruction": instruction_field,
        "context": context_field,
        "response": response_field,
        "category": category_field,
    }
    return read_instructions(open_source(dataset_name, dataset_config_name, split), given)


def read_instructions(source: Source, columns: Mapping[str, str]) -> LoadedInstructions:
    """Read the instruction rows of a source.

    Args:
        source: the source of the rows.
        columns: role (instruction, context, response, category) -> the user's name of its column. A column
            with an empty name is recognised by the names in `LAYOUTS`.

    Raises:
        UserError: the source cannot be read, its columns are not known, or no row is usable.
    """
    chosen = _resolve_columns(source, columns)
    rows: list[Instruction] = []
    skipped: list[SkippedRow] = []
    for where, fields in source.rows(sorted(set(chosen.values()))):
        try:
            rows.append(_instruction(fields, chosen))
        except _BrokenRowError as error:
            skipped.append(SkippedRow(where, str(error)))
    if not rows:
        first = f"; the first, {skipped[0].where}: {skipped[0].reason}" if skipped else ""
        raise UserError(f"{source.name}: no usable row ({len(skipped)} skipped{first})")
    return LoadedInstructions(rows, skipped)


def sample_rows(rows: Sequence[Instruction], max_rows: int, seed: int) -> list[Instruction]:
    """Draw a seeded sample of at most `max_rows` rows, in their order; 0 means all rows."""
    if max_rows == 0 or max_rows >= len(rows):
        return list(rows)
    chosen = random.Random(f"fedflame-sample-{seed}").sample(range(len(rows)), max_rows)
    return [rows[index] for index in sorted(chosen)]


def split_held_out(
    rows: Sequence[Instruction], rows_per_category: int, seed: int
) -> tuple[list[Instruction], list[Instruction]]:
    """Split rows into training rows and held-out rows, both in their order.

    Up to `rows_per_category` rows of each category are held out, but at most a fifth of its rows; of two to
    nine rows, one is held out. Copies of a row (same instruction, context and response, in any category) stay
    on the same side. So no row of a category is held out if each of its rows has more copies than may be held
    out.
    """
    room = {
        category: min(rows_per_category, max(count // 5, 1 if count >= 2 else 0))
        for category, count in Counter(row.category for row in rows).items()
    }
    copies: dict[_Content, list[int]] = {}
    for index, row in enumerate(rows):
        copies.setdefault(_content(row), []).append(index)
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


def validation_rows(
    rows: Sequence[Instruction], sample: Sequence[Instruction], test: Sequence[Instruction], seed: int
) -> list[Instruction]:
    """Draw validation rows, in their order: of each category as many as `test` has, or all there are.

    They are drawn from the rows that are neither in `sample`, which holds the training and test rows, nor
    copies of a row in it.
    """
    sampled = {_content(row) for row in sample}
    free = [index for index, row in enumerate(rows) if _content(row) not in sampled]
    random.Random(f"fedflame-validation-{seed}").shuffle(free)
    room, chosen = Counter(row.category for row in test), []
    for index in free:
        if room[rows[index].category] > 0:
            room[rows[index].category] -= 1
            chosen.append(index)
    return [rows[index] for index in sorted(chosen)]


def _content(row: Instruction) -> _Content:
    """Return what two copies of a row have in common; their categories may differ."""
    return (row.instruction, row.context, row.response)


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


def _resolve_columns(source: Source, given: Mapping[str, str]) -> dict[str, str]:
    """Return role -> column; names given by the user come first. Context and category may have no column."""
    chosen = {role: column for role, column in given.items() if column}
    if not source.columns:  # nothing to match; reading the rows then tells what is wrong
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


def _recognised(source: Source, free: Sequence[str], chosen: dict[str, str]) -> dict[str, str]:
    """Return the first layout whose columns for the open roles exist, if possible with its context column."""
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
