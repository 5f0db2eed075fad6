"""The interface through which a run reports its progress."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol


class Reporter(Protocol):
    """Receives the progress of a run."""

    def message(self, text: str) -> None:
        """Report one line of text."""

    def start_client(self, round_number: int, name: str, active_experts: int) -> None:
        """Report that a client begins its steps."""

    def end_client(self, name: str) -> None:
        """Report that a client has answered."""

    def step(self, tokens: int) -> None:
        """Report one optimizer step over this many tokens."""


class LineReporter:
    """Reports only messages, each as one line."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.message = say

    def start_client(self, round_number: int, name: str, active_experts: int) -> None:
        pass

    def end_client(self, name: str) -> None:
        pass

    def step(self, tokens: int) -> None:
        pass


class Silent(LineReporter):
    """Reports nothing."""

    def __init__(self) -> None:
        super().__init__(lambda text: None)
