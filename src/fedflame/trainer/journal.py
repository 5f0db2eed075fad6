"""The site's record of its answers, for its administrator to look at: updates, scores, refusals, failures.

No limit counts on it, unlike on the ledger: a line that cannot be written is left out, and one that cannot be
read is passed over. It stays small, since whoever may send requests may cause refusals without end.
"""

from __future__ import annotations

import json
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from fedflame.atomic_file import write_atomically
from fedflame.errors import UserError, one_line
from fedflame.reading import parse_object

FILE_NAME = "journal.jsonl"
LONGEST = 4 << 20
"""Bytes of the file; beyond them, its older half is removed."""
_LONGEST_LINE = 64 << 10
_TYPES = [float, str, str, int, int, int, int, float, str]
_KINDS = ("update", "evaluation", "refused", "failed")
_LATEST = 1e11
"""A time that a calendar still has."""


@dataclass(frozen=True)
class Answered:
    """An answer of the trainer. What is not known of a request that was refused is 0."""

    time: float
    """Seconds since 1970, at its end."""
    kind: Literal["update", "evaluation", "refused", "failed"]
    run: str
    """The run's id; empty where the request had none."""
    round: int = 0
    active_experts: int = 0
    steps: int = 0
    """Optimizer steps; 0 of an evaluation."""
    tokens: int = 0
    """Non-padding tokens trained on, or response tokens that were scored."""
    seconds: float = 0.0
    """From the request to the end of its work."""
    reason: str = ""
    """Why there is no update and no evaluation."""


class Journal:
    """Appends answers to the journal of a state folder; several threads may call it."""

    def __init__(self, state: Path) -> None:
        self._path, self._writing = state / FILE_NAME, threading.Lock()

    def update(
        self, run: str, round_number: int, active_experts: int, steps: int, tokens: int, seconds: float
    ) -> None:
        """Note an update that was trained."""
        work = (round_number, active_experts, steps, tokens, round(seconds, 3))
        self._append(Answered(time.time(), "update", run, *work))

    def evaluation(
        self, run: str, round_number: int, active_experts: int, tokens: int, seconds: float
    ) -> None:
        """Note an evaluation that was made."""
        work = (round_number, active_experts, 0, tokens, round(seconds, 3))
        self._append(Answered(time.time(), "evaluation", run, *work))

    def refusal(self, kind: Literal["refused", "failed"], run: str, reason: str) -> None:
        """Note a request that has no update."""
        self._append(Answered(time.time(), kind, run, reason=one_line(reason)))

    def _append(self, answer: Answered) -> None:
        line = json.dumps(asdict(answer)).encode() + b"\n"
        with self._writing, suppress(OSError, UserError):
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with self._path.open("ab") as file:
                file.write(line)
                size = file.tell()
            if size > LONGEST:
                later = self._path.read_bytes()[size // 2 :]
                write_atomically(self._path, later[later.index(b"\n") + 1 :])


def read_journal(state: Path) -> list[Answered]:
    """Return the answers in the journal of a state folder, oldest first; none if it cannot be read."""
    try:
        with (state / FILE_NAME).open("rb") as file:
            lines = file.read(2 * LONGEST).split(b"\n")
    except OSError:
        return []
    return [answer for answer in map(_read, lines) if answer is not None]


def _read(line: bytes) -> Answered | None:
    """Return the answer of a line; None where it is damaged."""
    try:
        values = parse_object(line[:_LONGEST_LINE])
        answer = Answered(**values)
    except (ValueError, TypeError):
        return None
    if [type(value) for value in asdict(answer).values()] != _TYPES:
        return None
    return answer if answer.kind in _KINDS and 0 <= answer.time < _LATEST else None
