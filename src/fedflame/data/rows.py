"""Read the rows of a source as conversations, sample them, and hold some out.

A row that cannot be used is skipped and recorded with its place and the reason. A UserError is raised only if
the source cannot be read at all or has no usable row.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from fedflame.data.columns import find_columns
from fedflame.data.conversations import Conversation, Turn
from fedflame.data.messages import BrokenRowError, read_conversation
from fedflame.data.sources import Source, open_source
from fedflame.errors import UserError


@dataclass(frozen=True)
class SkippedRow:
    """A row that could not be used: its place, such as `rows.jsonl:7`, and why."""

    where: str
    reason: str


@dataclass(frozen=True)
class LoadedRows:
    """The usable rows of a source in their order, and the skipped rows."""

    rows: list[Conversation]
    skipped: list[SkippedRow]
    columns: str = field(default="", compare=False)
    """Which columns were read as what, and which were ignored, in words."""

    def owned_by(self, owner: str) -> LoadedRows:
        """Return the same rows with this owner."""
        return replace(self, rows=[replace(row, owner=owner) for row in self.rows])


def load_rows(
    *,
    dataset_name: str,
    split: str = "train",
    dataset_config_name: str = "",
    messages_field: str = "",
    instruction_field: str = "",
    context_field: str = "",
    response_field: str = "",
    category_field: str = "",
    person_field: str = "",
) -> LoadedRows:
    """Load the rows of a local file or of a data set on the Hugging Face hub.

    Args:
        dataset_name: a file or a hub id; see `open_source`.
        split: split of a hub data set.
        dataset_config_name: configuration of a hub data set that has several; empty for its default.
        messages_field: column of whole conversations; recognised if empty.
        instruction_field: column of the instruction; if empty, the names in `columns` are recognised.
        context_field: column of the context, which a row may lack; recognised if empty.
        response_field: column of the response; recognised if empty.
        category_field: column of the category. If empty, the column `category` is used; without one, all rows
            have the category "all".
        person_field: column of the person whom a row is about; empty if no column says it.

    Raises:
        UserError: the source cannot be read, its columns are not known, or no row is usable.
    """
    given = {
        "messages": messages_field,
        "instruction": instruction_field,
        "context": context_field,
        "response": response_field,
        "category": category_field,
        "person": person_field,
    }
    return read_rows(open_source(dataset_name, dataset_config_name, split), given)


def read_rows(source: Source, given: Mapping[str, str], may_be_empty: bool = False) -> LoadedRows:
    """Read the rows of a source.

    Args:
        source: the source of the rows.
        given: role -> the user's name of its column; see `find_columns`.
        may_be_empty: whether it may have no row at all.

    Raises:
        UserError: the source cannot be read, its columns are not known, or no row is usable.
    """
    columns = find_columns(source, given)
    rows: list[Conversation] = []
    skipped: list[SkippedRow] = []
    for where, fields in source.rows(sorted(set(columns.taken.values()))):
        try:
            if isinstance(fields, str):
                raise BrokenRowError(fields)
            rows.append(read_conversation(fields, columns.taken, where))
        except BrokenRowError as error:
            skipped.append(SkippedRow(where, str(error)))
    if not rows and (skipped or not may_be_empty):
        first = f"; the first, {skipped[0].where}: {skipped[0].reason}" if skipped else ""
        raise UserError(f"{source.name}: no usable row ({len(skipped)} skipped{first})")
    return LoadedRows(rows, skipped, columns.in_words())


def sample_rows(rows: Sequence[Conversation], max_rows: int, seed: int) -> list[Conversation]:
    """Draw a seeded sample of at most `max_rows` rows, in their order; 0 means all rows."""
    if max_rows == 0 or max_rows >= len(rows):
        return list(rows)
    chosen = random.Random(f"fedflame-sample-{seed}").sample(range(len(rows)), max_rows)
    return [rows[index] for index in sorted(chosen)]


def split_held_out(
    rows: Sequence[Conversation], rows_per_category: int, seed: int
) -> tuple[list[Conversation], list[Conversation]]:
    """Split rows into training rows and held-out rows, both in their order.

    Up to `rows_per_category` rows of each category are held out, but at most a fifth of its rows; of two to
    nine rows, one is held out. Copies of a row (the same is said, in any category) stay
    on the same side. So no row of a category is held out if each of its rows has more copies than may be held
    out.
    """
    room = {
        category: min(rows_per_category, max(count // 5, 1 if count >= 2 else 0))
        for category, count in Counter(row.category for row in rows).items()
    }
    copies: dict[tuple[tuple[Turn, ...], str], list[int]] = {}
    for index, row in enumerate(rows):
        copies.setdefault(row.content, []).append(index)
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
    rows: Sequence[Conversation], sample: Sequence[Conversation], test: Sequence[Conversation], seed: int
) -> list[Conversation]:
    """Draw validation rows, in their order: of each category as many as `test` has, or all there are.

    They are drawn from the rows that are neither in `sample`, which holds the training and test rows, nor
    copies of a row in it.
    """
    sampled = {row.content for row in sample}
    free = [index for index, row in enumerate(rows) if row.content not in sampled]
    random.Random(f"fedflame-validation-{seed}").shuffle(free)
    room, chosen = Counter(row.category for row in test), []
    for index in free:
        if room[rows[index].category] > 0:
            room[rows[index].category] -= 1
            chosen.append(index)
    return [rows[index] for index in sorted(chosen)]
