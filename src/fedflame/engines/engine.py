"""What the driver needs of an engine."""

from __future__ import annotations

from collections.abc import Set
from pathlib import Path
from typing import Protocol


class Engine(Protocol):
    """Runs jobs; the process of a job on the hub connects to the driver's socket as a `HubLink`."""

    def submit(self, hub_socket: Path, job_key: str) -> str:
        """Start a job that shows this key to the driver; its id. Raises OSError where it is not taken."""

    def ended(self, job: str) -> str | None:
        """Why the job is over, in the engine's words; None while it is not."""

    def stop(self, job: str) -> None:
        """End the job, if it is still there."""

    def connected(self) -> Set[str] | None:
        """The sites that a new job would reach; None where the engine cannot say."""
