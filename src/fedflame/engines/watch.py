"""Questions to an engine about its jobs, asked beside the run, so that nobody waits for an answer."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable

STATUS_SECONDS = (5.0,) * 6 + (30.0,)
"""Until the next question about a job, the last again and again: each starts a process or two."""


class JobWatch:
    """What the last question about each job found."""

    def __init__(self) -> None:
        self._over: dict[str, str | None] = {}
        """Why a job that is watched is over; None while it is not."""

    def begin(self, job: str, ask: Callable[[], str | None]) -> None:
        """Watch a job until it is over or nobody wants to know.

        Args:
            job: its id.
            ask: why it is over, or None; raises OSError where the engine cannot say.
        """
        self._over[job] = None
        threading.Thread(target=self._watch, args=(job, ask), daemon=True).start()

    def ended(self, job: str) -> str | None:
        """See `Engine.ended`."""
        return self._over.get(job)

    def forget(self, job: str) -> None:
        """Nobody wants to know any longer."""
        self._over.pop(job, None)

    def _watch(self, job: str, ask: Callable[[], str | None]) -> None:
        for seconds in itertools.chain(STATUS_SECONDS, itertools.repeat(STATUS_SECONDS[-1])):
            time.sleep(seconds)
            if job not in self._over:
                return
            try:
                why = ask()
            except OSError:
                continue  # a server that is away may come back; the driver's connection tells the rest
            if job in self._over and why is not None:
                self._over[job] = why
                return
