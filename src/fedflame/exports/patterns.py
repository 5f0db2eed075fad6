r"""PEFT's patterns of module names, such as `.*\.gate_up_proj`, matched in bounded time.

PEFT reads the keys of `rank_pattern` and `alpha_pattern` as regular expressions, and a stranger's could run
without end. What occurs in adapters is a name or its last parts, with `\.` for a dot, `.` for any letter,
`.*` for any letters, and `^` at the start. That means here what it means in PEFT; the rest is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

LONGEST = 256
"""Letters of a pattern."""
MOST_OPEN = 16
"""Patterns with `.*` in an adapter: each costs a walk over every name."""
_PART = re.compile(r"\.\*|\\\.|[A-Za-z0-9_.-]")
_ANY, _ANY_NUMBER = ".", ".*"


@dataclass(frozen=True)
class Pattern:
    """A pattern, taken apart."""

    key: str
    parts: tuple[str, ...]
    """Letters, `.` for any letter, `.*` for any number of any letters."""
    whole: bool
    """Whether it is for the whole name, not also for its last parts."""

    def matches(self, name: str) -> bool:
        r"""Return whether PEFT's regular expression `(.*\.)?(key)$` matches the name."""
        starts = [0] if self.whole else [0, *(at + 1 for at, letter in enumerate(name) if letter == ".")]
        if _ANY_NUMBER not in self.parts:
            start = len(name) - len(self.parts)
            return start in starts and all(map(_is, self.parts, name[start:]))
        return self._ends_at_the_end(name, {*starts})

    def _ends_at_the_end(self, name: str, starts: set[int]) -> bool:
        """Walk along the name once, with the set of the parts that may come next."""
        waiting: set[int] = set()
        for at, letter in enumerate(name):
            waiting = self._beyond(waiting | ({0} if at in starts else set()))
            fitting = [part for part in waiting if part < len(self.parts) and _is(self.parts[part], letter)]
            waiting = {part + (self.parts[part] != _ANY_NUMBER) for part in fitting}
        return len(self.parts) in self._beyond(waiting | ({0} if len(name) in starts else set()))

    def _beyond(self, waiting: set[int]) -> set[int]:
        """Add the parts after a `.*`, which may be empty."""
        reached = set(waiting)
        for part in sorted(waiting):
            while part < len(self.parts) and self.parts[part] == _ANY_NUMBER:
                part += 1
                reached.add(part)
        return reached


def parse_patterns(keys: Iterable[str]) -> tuple[Pattern, ...]:
    """Take the keys apart, in their order.

    Raises:
        ValueError: a key is not of the supported form, or there are too many with `.*`.
    """
    patterns = tuple(map(_parsed, keys))
    if sum(_ANY_NUMBER in pattern.parts for pattern in patterns) > MOST_OPEN:
        raise ValueError(f"at most {MOST_OPEN} patterns with .* are supported")
    return patterns


def first_match(patterns: Iterable[Pattern], name: str) -> str:
    """Return the key of the first pattern that matches, as PEFT does; empty if there is none."""
    return next((pattern.key for pattern in patterns if pattern.matches(name)), "")


def _parsed(key: str) -> Pattern:
    body = key.removeprefix("^")
    parts = _PART.findall(body) if len(key) <= LONGEST else []
    if not parts or "".join(parts) != body:
        raise ValueError(
            f"pattern {key[:LONGEST]!r}: a name of at most {LONGEST} letters is supported, with .* for any "
            r"letters, \. for a dot and ^ at the start"
        )
    return Pattern(key, tuple(parts), body != key)


def _is(part: str, letter: str) -> bool:
    """Return whether one letter matches one part; a regular expression's `.` does not match a line's end."""
    if part in (_ANY, _ANY_NUMBER):
        return letter != "\n"
    return letter == (part if part != "\\." else ".")
