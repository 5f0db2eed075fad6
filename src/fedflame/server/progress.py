"""What a run tells while it works, to whoever shows it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol


class Reporter(Protocol):
    """Where progress goes."""

    def message(self, text: str) -> None:
        """Say one line."""

    def start_client(self, round_number: int, name: str, active_experts: int) -> None:
        """A client begins its steps."""

    def end_client(self, name: str) -> None:
        """A client has answered."""

    def step(self, tokens: int) -> None:
        """One optimizer step over so many tokens is done."""


class LineReporter:
    """Messages alone, each as one line."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.message = say

    def start_client(self, round_number: int, name: str, active_experts: int) -> None:
        pass

    def end_client(self, name: str) -> None:
        pass

    def step(self, tokens: int) -> None:
        pass


class Silent(LineReporter):
    """Says nothing."""

    def __init__(self) -> None:
        super().__init__(lambda text: None)
