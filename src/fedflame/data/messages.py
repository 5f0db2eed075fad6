"""Read the fields of one row into a conversation. Rows are a user's, so nothing of them is taken on trust."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from fedflame.data.conversations import Conversation, Role, Turn
from fedflame.reading import parse_json, require_plain, shown

LONGEST_ROW = 1 << 20
"""The most characters in a row."""
MOST_TURNS = 1000
ROLES: dict[str, Role] = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "model": "assistant",
    "tool": "tool", "function": "tool", "observation": "tool", "function_response": "tool",
}  # fmt: skip
"""What OpenAI, ShareGPT and others call a role -> what chat templates call it."""
MORE = ("tool_calls", "tool_call_id", "name", "reasoning_content", "thinking")
"""What else of a message is passed on to a chat template."""

_OWNERS = ("client", "person")


class BrokenRowError(Exception):
    """One row cannot be used; the message is the reason."""


def read_conversation(fields: Mapping[str, object], columns: Mapping[str, str], where: str) -> Conversation:
    """Return the conversation in a row.

    Args:
        fields: column -> value.
        columns: role -> column; see `columns.Columns`.
        where: the place of the row.

    Raises:
        BrokenRowError: the row has no such fields, they are no conversation, or it is too large.
    """
    found = _messages(fields, columns) if "messages" in columns else _prompt_and_completion(fields, columns)
    row = replace(
        found,
        category=_filled(fields, columns["category"]) if "category" in columns else "all",
        tools=_tools(fields, columns),
        owner=next((_filled(fields, columns[role]) for role in _OWNERS if role in columns), ""),
        where=where,
    )
    size = len(row.tools) + sum(len(turn.content) + len(turn.context) + len(turn.more) for turn in row.turns)
    if size > LONGEST_ROW:
        raise BrokenRowError(f"has {size:,} characters; at most {LONGEST_ROW:,} are read")
    return row


def _messages(fields: Mapping[str, object], columns: Mapping[str, str]) -> Conversation:
    column = columns["messages"]
    turns = _turns(_listed(fields, column), column)
    if turns[:1] and turns[0].role != "system":
        turns = [*_system(fields, columns), *turns]
    last = max((index for index, turn in enumerate(turns) if turn.role == "assistant"), default=None)
    if last is None:
        raise BrokenRowError(f"{column!r} has no turn of the assistant")
    return Conversation(tuple(turns[: last + 1]))


def _prompt_and_completion(fields: Mapping[str, object], columns: Mapping[str, str]) -> Conversation:
    """Read text or messages. A completion's turns after the assistant's last one are left out."""
    asked, answered = columns["instruction"], columns["response"]
    if isinstance(fields.get(asked), list):
        prompt = _turns(_listed(fields, asked), asked)
    else:
        has_context = "context" in columns and fields.get(columns["context"]) is not None
        context = _text(fields, columns["context"]) if has_context else ""
        prompt = [Turn("user", _filled(fields, asked), context)]
    if isinstance(fields.get(answered), list):
        completion = _turns(_listed(fields, answered), answered)
    else:
        completion = [Turn("assistant", _filled(fields, answered))]
    while completion and completion[-1].role != "assistant":
        completion.pop()
    if not completion:
        raise BrokenRowError(f"{answered!r} has no turn of the assistant")
    if prompt[:1] and prompt[0].role != "system":
        prompt = [*_system(fields, columns), *prompt]
    if not prompt:
        raise BrokenRowError(f"{asked!r} is empty")
    return Conversation((*prompt, *completion), completion=len(prompt))


def _system(fields: Mapping[str, object], columns: Mapping[str, str]) -> list[Turn]:
    """Return the turn of a `system` column, or nothing if the row has none."""
    if "system" not in columns or fields.get(columns["system"]) is None:
        return []
    text = _text(fields, columns["system"])
    return [Turn("system", text)] if text.strip() else []


def _listed(fields: Mapping[str, object], column: str) -> Sequence[Any]:
    """Return the messages of a column; in a .csv file they are JSON text."""
    value = fields.get(column)
    if value is None:
        raise BrokenRowError(f"{column!r} is missing")
    if isinstance(value, str):
        value = _parsed(value, column)
    if not isinstance(value, list):
        raise BrokenRowError(f"{column!r} is of type {type(value).__name__}, not a list of messages")
    if len(value) > MOST_TURNS:
        raise BrokenRowError(f"{column!r} has {len(value):,} messages; at most {MOST_TURNS:,} are read")
    return value


def _turns(messages: Sequence[Any], column: str) -> list[Turn]:
    return [_turn(one, f"{column!r}, message {number}") for number, one in enumerate(messages, start=1)]


def _turn(one: Any, what: str) -> Turn:
    if not isinstance(one, Mapping):
        raise BrokenRowError(f"{what} is of type {type(one).__name__}, not an object")
    named = next((key for key in ("role", "from") if one.get(key) is not None), None)
    if named is None:
        raise BrokenRowError(f"{what} has neither 'role' nor 'from'")
    role = ROLES.get(one[named].strip().lower()) if isinstance(one[named], str) else None
    if role is None:
        raise BrokenRowError(
            f"{what}: {named} {shown(one[named], 40)} is not known; known are {', '.join(ROLES)}"
        )
    more = {key: one[key] for key in MORE if one.get(key) not in (None, "", [])}
    content = _content(one.get("content", one.get("value")), what)
    if role == "assistant" and not content.strip() and "tool_calls" not in more:
        raise BrokenRowError(f"{what}: the assistant says nothing")
    return Turn(role, content, more=_json(more, what) if more else "")


def _content(value: object, what: str) -> str:
    """Return text, or the text parts of a list joined; nothing is said where there is only a tool call."""
    if value is None:
        return ""
    if isinstance(value, str):
        return _encodable(value, what)
    if not isinstance(value, list):
        raise BrokenRowError(f"{what}: its content is of type {type(value).__name__}, not text")
    parts = []
    for part in value:
        text = part.get("text") if isinstance(part, Mapping) and part.get("type", "text") == "text" else part
        if not isinstance(text, str):
            kind = part.get("type", "part") if isinstance(part, Mapping) else type(part).__name__
            raise BrokenRowError(f"{what}: a {shown(kind, 40)} in its content is not text")
        parts.append(_encodable(text, what))
    return "".join(parts)


def _tools(fields: Mapping[str, object], columns: Mapping[str, str]) -> str:
    value = fields.get(columns["tools"]) if "tools" in columns else None
    if value in (None, "", []):
        return ""
    column = columns["tools"]
    tools = _parsed(value, column) if isinstance(value, str) else value
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise BrokenRowError(f"{column!r} is not a list of objects")
    return _json(tools, repr(column)) if tools else ""


def _parsed(text: str, column: str) -> Any:
    try:
        return parse_json(_encodable(text, repr(column)).encode())
    except ValueError as error:
        raise BrokenRowError(f"{column!r} is text and {error}") from None


def _json(value: Any, what: str) -> str:
    try:
        require_plain(value)
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise BrokenRowError(f"{what}: {error or type(error).__name__}") from None


def _filled(fields: Mapping[str, object], column: str) -> str:
    text = _text(fields, column)
    if not text.strip():
        raise BrokenRowError(f"{column!r} is empty")
    return text


def _text(fields: Mapping[str, object], column: str) -> str:
    value = fields.get(column)
    if value is None:
        raise BrokenRowError(f"{column!r} is missing")
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise BrokenRowError(f"{column!r} is of type {type(value).__name__}, not text")
    if isinstance(value, float) and not math.isfinite(value):
        raise BrokenRowError(f"{column!r} is {value}, not text")
    return _encodable(str(value), repr(column))


def _encodable(text: str, what: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BrokenRowError(f"{what} is not valid UTF-8") from None
    return text
