"""The interface between the driver and an engine."""

from __future__ import annotations

from collections.abc import Set
from pathlib import Path
from typing import Protocol


class Engine(Protocol):
    """Runs jobs. The process of a job on the hub connects to the driver's socket with a `HubLink`."""

    def submit(self, hub_socket: Path, job_key: str) -> str:
        """Start a job that sends this key to the driver; return its id. Raises OSError if it is refused."""

    def ended(self, job: str) -> str | None:
        """Return why the job is over, in the engine's words; None while it runs."""

    def stop(self, job: str) -> None:
        """End the job if it still runs."""

    def connected(self) -> Set[str] | None:
        """Return the sites that a new job would reach; None if the engine cannot tell."""
