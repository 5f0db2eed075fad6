"""The typed form of a row: a conversation, whatever the columns of its source are called."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import astuple, dataclass, field
from typing import Any, Literal

Role = Literal["system", "user", "assistant", "tool"]


@dataclass(frozen=True)
class Turn:
    """What one side says."""

    role: Role
    content: str
    context: str = ""
    """What the content is about, if the row has it in a column of its own, such as Alpaca's `input`."""
    more: str = ""
    """A JSON object of what else a chat template may read, such as `tool_calls`; empty for nothing."""


@dataclass(frozen=True)
class Conversation:
    """A row. It ends with the assistant's last turn."""

    turns: tuple[Turn, ...]
    category: str = "all"
    """The label for partitions and scores."""
    tools: str = ""
    """A JSON list of the tools that the assistant may call; empty for none."""
    completion: int = 0
    """The turn at which the completion begins, if the row says what is prompt and what completion; else 0."""
    owner: str = field(default="", compare=False)
    """The client that the row belongs to, or the person whom it is about, if the data says it."""
    where: str = field(default="", compare=False)
    """The place of the row in its source, such as `rows.jsonl:7`."""

    @property
    def response(self) -> str:
        """What the assistant says last."""
        return self.turns[-1].content

    @property
    def content(self) -> tuple[tuple[Turn, ...], str]:
        """What two copies of a row have in common; their categories may differ."""
        return self.turns, self.tools

    @property
    def is_single_turn(self) -> bool:
        """Whether it is one instruction and its response, and nothing else."""
        return (
            [turn.role for turn in self.turns] == ["user", "assistant"]
            and not self.tools
            and not any(turn.more for turn in self.turns)
        )

    def to_values(self) -> list[Any]:
        """Return plain values that tell two rows apart."""
        if self.is_single_turn:
            user, assistant = self.turns
            return [user.content, user.context, assistant.content, self.category]
        return [[astuple(turn) for turn in self.turns], self.tools, self.completion, self.category]


def single_turn(instruction: str, context: str, response: str, category: str) -> Conversation:
    """Return the conversation of an instruction, its context, which may be empty, and its response."""
    turns = Turn("user", instruction, context), Turn("assistant", response)
    return Conversation(turns, category, completion=1)


def message(turn: Turn) -> dict[str, Any]:
    """Return a turn as chat templates read it; a context follows the content after an empty line."""
    content = f"{turn.content}\n\n{turn.context}" if turn.context else turn.content
    return {"role": turn.role, "content": content, **(json.loads(turn.more) if turn.more else {})}


def as_fields(rows: Sequence[Conversation]) -> list[dict[str, Any]]:
    """Return the columns of a file from which `rows` reads these rows: one form that suits them all."""
    if all(row.is_single_turn for row in rows):
        return [_instruction_fields(row) for row in rows]
    split = all(row.completion for row in rows)
    return [_message_fields(row, split) for row in rows]


def _instruction_fields(row: Conversation) -> dict[str, Any]:
    user, assistant = row.turns
    columns = {"instruction": user.content, "context": user.context, "response": assistant.content}
    return columns | {"category": row.category}


def _message_fields(row: Conversation, split: bool) -> dict[str, Any]:
    turns, start = [message(turn) for turn in row.turns], row.completion
    said = {"prompt": turns[:start], "completion": turns[start:]} if split else {"messages": turns}
    return said | ({"tools": row.tools} if row.tools else {}) | {"category": row.category}
