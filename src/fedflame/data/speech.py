"""Where in a rendered conversation the assistant speaks: what it must write itself, and its end of turn.

A template that has marks (`{% generation %}`) says so itself. Of others, the text before a turn is what the
template gives for the turns before it with a generation prompt, and the text after it is what it gives for
the turns up to it. A turn that the template writes in another form once more turns follow, as templates do
that drop earlier thinking, is not what the assistant would have to write: it is context and has no loss.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from fedflame.data.conversations import Conversation, Turn
from fedflame.data.messages import BrokenRowError
from fedflame.data.templates import Template


@dataclass(frozen=True)
class Stretch:
    """One turn of the assistant in a text: from `start` to `end`, its end of turn beginning at `closing`."""

    start: int
    closing: int
    end: int

    @property
    def is_closed(self) -> bool:
        """Whether the template writes an end of turn."""
        return self.closing < self.end


def find_speech(
    row: Conversation, text: str, template: Template, special: re.Pattern[str], completion_only: bool
) -> list[Stretch]:
    """Find the assistant's turns in a text: those that it would have to write in this form.

    Args:
        row: the conversation.
        text: what the template makes of it.
        template: how it becomes text.
        special: matches the tokenizer's special tokens.
        completion_only: only the turns of the completion, or the last one if the row does not say where that
            begins.

    Raises:
        BrokenRowError: the template does not take the row, or writes no turn of the assistant as it would
            have to be generated.
    """
    spoken = [index for index, turn in enumerate(row.turns) if turn.role == "assistant"]
    first = (row.completion or spoken[-1]) if completion_only else 0
    wanted = [index for index in spoken if index >= first]
    if template.has_marks:
        marks = template.marks(row.turns, row.tools)
        stretches = [_closed(text, start, stop, "", special, True) for start, stop in marks[-len(wanted) :]]
    else:
        found = [_stretch(text, row, index, template, special) for index in wanted]
        stretches = [stretch for stretch in found if stretch is not None]
    if not stretches:
        raise BrokenRowError("the chat template writes no turn of the assistant as it would be generated")
    return stretches


def _stretch(
    text: str, row: Conversation, index: int, template: Template, special: re.Pattern[str]
) -> Stretch | None:
    start = _start(text, row, index, template)
    if start is None:
        return None
    is_last = index == len(row.turns) - 1
    alone = text if is_last else template.render(row.turns[: index + 1], row.tools)
    stop = len(text) if is_last else _alike(alone, text)
    differs = stop < len(alone)
    if differs:  # not in the middle of the token where they part
        around = special.finditer(text, max(start, stop - 100))
        stop = next((match.start() for match in around if match.start() < stop < match.end()), stop)
    turn = row.turns[index]
    content = turn.content.strip()
    if stop <= start or (differs and content not in text[start:stop]):
        return None
    # After the content of a turn with a tool call the call follows, and not the end of the turn.
    return _closed(text, start, stop, "" if "tool_calls" in turn.more else content, special, False)


def _start(text: str, row: Conversation, index: int, template: Template) -> int | None:
    """Return where a turn begins: after its generation prompt, or after as much of it as the text has."""
    before = template.render(row.turns[:index], row.tools, prompt=True)
    if text.startswith(before):
        return len(before)
    without = template.render(row.turns[:index], row.tools)
    if not (text.startswith(without) and before.startswith(without)):
        return None
    same = before[len(without) : _alike(before, text)]
    whole = max(same.rfind("\n"), same.rfind(">")) + 1  # not in the middle of a token
    return len(without) + (whole or len(same))


def _alike(one: str, other: str) -> int:
    """Return how many characters two texts have in common at their beginning."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[low:middle] == other[low:middle] else (low, middle - 1)
    return low


def _closed(
    text: str, start: int, stop: int, content: str, special: re.Pattern[str], marked: bool
) -> Stretch:
    """Return the turn between `start` and `stop` with its end of turn and nothing after it."""
    said = text.find(content, start, stop) + len(content) if content and content in text[start:stop] else None
    if said is not None and (match := _end_of_turn(text, said, stop, special)):
        return Stretch(start, match.start(1), match.end(1))
    tail = start + len(text[start:stop].rstrip())
    last = None
    for match in special.finditer(text, start, tail):
        last = match
    if last is not None and last.end() == tail:
        return Stretch(start, last.start(), tail)
    if marked and (match := _end_of_turn(text, stop, len(text), special)):
        return Stretch(start, match.start(1), match.end(1))
    return Stretch(start, stop, stop)


def _end_of_turn(text: str, start: int, stop: int, special: re.Pattern[str]) -> re.Match[str] | None:
    """Match white space and a special token at `start`."""
    return re.compile(rf"\s*({special.pattern})").match(text, start, stop)


def find_asked(text: str, turns: Sequence[Turn], before: int) -> list[tuple[int, int]]:
    """Find what the last user says before a place in the text: its context, and then its content."""
    user = next((turn for turn in reversed(turns) if turn.role == "user"), None)
    found: list[tuple[int, int]] = []
    for said in (user.context.strip(), user.content.strip()) if user else ():
        place = text.rfind(said, 0, before) if said else -1
        if place >= 0:
            found.append((place, place + len(said)))
            before = place
    return found
