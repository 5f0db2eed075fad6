"""A request to one site, and the files in which its plan and its answer wait."""

from __future__ import annotations

import mmap
import secrets
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from fedflame.errors import UserError
from fedflame.wire.envelope import LONGEST_BEFORE_BODY, Bytes

_WEIGHTS = 1 << 20
"""Bytes of what a sum holds beside the values of a plan: a number for each expert of each layer."""


def new_ticket() -> str:
    """Return a random ticket."""
    return secrets.token_hex(16)


@dataclass
class Request:
    """A request to one site. Its plan is on disk, so that memory does not grow with the number of sites."""

    site: str
    kind: Literal["describe", "train", "evaluate", "sum"]
    plan_path: Path
    """File of the whole plan; unused if the request asks for a description."""
    longest_answer: int
    """Most bytes of an answer, with its envelope; a longer one is not read."""
    work: float = 1.0
    """Steps, or passes over the rows to score, times experts per token that the plan asks for."""
    ticket: str = field(default_factory=new_ticket)
    addition: bool = False
    """Whether to send only the difference between the plan and the plan that the site holds."""
    start: float = field(default_factory=time.monotonic)
    asked: float = field(default_factory=time.monotonic)
    """When it was last sent."""
    answered_before: bool = False
    """Whether the site has answered this plan before, so that its answer takes no work."""
    gone: str = ""
    """Why the engine does not reach the site; empty while it does."""
    returns: int = 0
    """Jobs that were started because the site was back."""
    failure: str = ""
    answered: bool = False
    """Whether the site has given a usable answer."""
    body: Bytes | None = None
    """The body of the answer, unless it is in `answer_path`."""
    steps: tuple[int, int] = (0, 0)
    """The steps that the site says it took, and the tokens of each."""
    seconds: float = 0.0
    sent: bool = False
    """Whether it was sent to the current job."""
    bytes_down: int = 0
    """Bytes sent so far, including those to jobs that ended."""

    @property
    def has_plan(self) -> bool:
        """Whether its body is a plan, which the site holds once it has answered."""
        return self.kind in ("train", "evaluate")

    @property
    def addition_path(self) -> Path:
        return self.plan_path.with_suffix(".addition")

    @property
    def held_path(self) -> Path:
        """File of the last plan that the site has answered."""
        return self.plan_path.with_suffix(".held")

    @property
    def answer_path(self) -> Path:
        return self.plan_path.with_suffix(".answer")

    @property
    def content(self) -> memoryview:
        """The body of the request."""
        if self.kind == "describe":
            return memoryview(b"")
        return mapped(self.addition_path if self.addition else self.plan_path)

    @property
    def settled(self) -> bool:
        return self.answered or bool(self.failure)

    def fail(self, reason: str) -> None:
        """Settle the request without an answer."""
        self.failure, self.seconds = reason, time.monotonic() - self.start

    def take_body(self) -> Bytes:
        """Return the body of the answer from memory or from disk, and delete it there."""
        if self.body is None:
            self.body = self.answer_path.read_bytes()
            self.answer_path.unlink()
        body, self.body = self.body, None
        return body


def sum_request(plan_path: Path, message: bytes) -> Request:
    """Prepare the request for a site's part of a sum, beside the file of the plan that it has answered.

    A sum has the values of the plan, or fewer.
    """
    request = Request(plan_path.stem, "sum", plan_path.with_suffix(".sum"), LONGEST_BEFORE_BODY + _WEIGHTS)
    if request.held_path.exists():
        request.longest_answer += request.held_path.stat().st_size
    store(request.plan_path, message)
    return request


def store(path: Path, content: Bytes) -> None:
    """Write a plan or an answer that waits. Raises UserError if the hub's disk is full."""
    try:
        path.write_bytes(content)
    except OSError as error:
        raise UserError(
            f"{path}: cannot write {len(content):,} bytes: {error.strerror}; make room, or set TMPDIR to a "
            "folder with more"
        ) from error


def mapped(path: Path) -> memoryview:
    """Map a file that is not empty into memory. Writes to the view do not change the file."""
    with path.open("rb") as file:
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
