"""Which columns of a source are read as what: by the names that users know, or by those that they give."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedflame.data.sources import Source
from fedflame.errors import UserError

MESSAGES = ("messages", "conversations")
"""Columns of whole conversations, as OpenAI (`role`, `content`) or ShareGPT (`from`, `value`) spell them."""
LAYOUTS = (
    {"instruction": "instruction", "context": "input", "response": "output"},  # Alpaca
    {"instruction": "instruction", "context": "context", "response": "response"},  # Dolly
    {"instruction": "question", "context": "context", "response": "answer"},
    {"instruction": "prompt", "context": "context", "response": "completion"},
)
"""The columns of instruction data. If no layout has all its columns, those of several are mixed."""
BESIDE = {"system": ("system", "system_prompt"), "tools": ("tools",), "category": ("category",)}
"""Columns that a row of any form may have."""


@dataclass(frozen=True)
class Columns:
    """Role -> column, and the columns that no role has."""

    taken: Mapping[str, str]
    ignored: tuple[str, ...]

    def in_words(self) -> str:
        """Return which column is read as what, and which are not read."""
        taken = ", ".join(
            repr(column) if column == role else f"{column!r} as {role}" for role, column in self.taken.items()
        )
        return f"columns read: {taken}" + (f"; ignored: {listed(self.ignored)}" if self.ignored else "")


def find_columns(source: Source, given: Mapping[str, str]) -> Columns:
    """Return the columns to read. Names given by the user come first.

    Args:
        source: what has the columns.
        given: role (messages, instruction, context, response, category, client or person) -> the user's name
            of its column, or an empty name for a column that is recognised.

    Raises:
        UserError: a name that is no column, no column is recognised, or a column occurs more than once.
    """
    chosen = {role: column for role, column in given.items() if column}
    if not source.columns:  # nothing to match; reading the rows then tells what is wrong
        return Columns(LAYOUTS[0] | chosen, ())
    for role, column in chosen.items():
        if column not in source.columns:
            nearest = difflib.get_close_matches(column, source.columns, n=1, cutoff=0.0)[0]
            raise UserError(
                f"data.{role}_field = {column!r}: {source.name} has no such column; "
                f"the nearest is {nearest!r} of {listed(source.columns)}"
            )
    free = [column for column in source.columns if column not in chosen.values()]
    taken = {**_spoken(source, free, chosen), **chosen}
    for role, names in BESIDE.items():
        for column in names:
            if column in free and column not in taken.values():
                taken.setdefault(role, column)
    for column in taken.values():
        if source.columns.count(column) > 1:
            raise UserError(f"{source.name}: column {column!r} occurs more than once")
    return Columns(taken, tuple(column for column in source.columns if column not in taken.values()))


def _spoken(source: Source, free: Sequence[str], chosen: Mapping[str, str]) -> dict[str, str]:
    """Return the columns of what is said: of whole conversations, or of instruction, context and response."""
    if "messages" in chosen:
        return {}
    wanted = [role for role in ("instruction", "response") if role not in chosen]
    whole = [column for column in MESSAGES if column in free]
    if whole and len(wanted) == 2:
        return {"messages": whole[0]}
    best = _layout(free, wanted)
    if best is None:
        keys = " and ".join(f"data.{role}_field" for role in wanted)
        also = ", or whole conversations with data.messages_field" if len(wanted) == 2 else ""
        raise UserError(
            f"{source.name}: no column recognised as {' and '.join(wanted)} "
            f"among {listed(source.columns)}; name it with {keys}{also}"
        )
    return {role: column for role, column in best.items() if column in free}


def _layout(free: Sequence[str], wanted: Sequence[str]) -> dict[str, str] | None:
    """Return the first layout whose columns for the wanted roles exist, if possible with its context.

    If none has them all, or there is a context of another layout, each role has the first column that exists.
    """
    layouts = [layout for layout in LAYOUTS if all(layout[role] in free for role in wanted)]
    best = max(layouts, key=lambda layout: layout["context"] in free, default={})
    mixed = {
        role: next((layout[role] for layout in LAYOUTS if layout[role] in free), "") for role in LAYOUTS[0]
    }
    if not best and not all(mixed[role] for role in wanted):
        return None
    has_context = bool(best) and best["context"] in free
    return mixed | best | ({} if has_context else {"context": mixed["context"]})


def listed(columns: Sequence[str]) -> str:
    """Return the names, not more than a line has room for."""
    shown = ", ".join(repr(column) for column in columns[:20])
    return shown + (f" and {len(columns) - 20} more" if len(columns) > 20 else "")
