"""The exceptions of fedflame: errors that the user can mend, and messages that must not be used."""

from __future__ import annotations

USER_ERROR = 2
"""Exit code of a process that a `UserError` ended."""


class UserError(Exception):
    """Input that cannot be used. The message is one line: what was got and what is allowed."""


class OutOfMemory(UserError):
    """The memory of a device is full. This ends a run, since it is not the failure of one client."""


class NotFinite(Exception):
    """The work is done and kept, but a loss of its result is not finite. The message is one line."""


class InvalidMessage(Exception):
    """A received buffer or update that must not be used. The message is the reason, in `one_line`."""

    def __init__(self, reason: str) -> None:
        super().__init__(one_line(reason))


LONGEST_LINE = 1000
"""Letters of foreign text that are printed and stored."""


def one_line(text: str) -> str:
    """Return text of another machine as one line of at most `LONGEST_LINE` letters, fit to print and store.

    Letters that cannot be printed become spaces: control characters, with which a terminal can be made to
    lie, and lone surrogates, which no file takes.
    """
    start = text[: 2 * LONGEST_LINE]
    line = " ".join("".join(letter if letter.isprintable() else " " for letter in start).split())
    return line if len(line) <= LONGEST_LINE else f"{line[: LONGEST_LINE - 3]}..."
