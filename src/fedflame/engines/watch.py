"""Ask an engine for the status of its jobs, in a thread, so that the run does not wait for the answer."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable

STATUS_SECONDS = (5.0,) * 6 + (30.0,)
"""Waits between status queries, in seconds; the last repeats. Each query starts a process or two."""


class JobWatch:
    """Holds the result of the last status query for each job."""

    def __init__(self) -> None:
        self._over: dict[str, str | None] = {}
        """Watched job -> why it is over, or None while it runs."""

    def begin(self, job: str, ask: Callable[[], str | None]) -> None:
        """Watch a job until it is over or `forget` is called.

        Args:
            job: its id.
            ask: returns why the job is over, or None; raises OSError if the engine does not answer.
        """
        self._over[job] = None
        threading.Thread(target=self._watch, args=(job, ask), daemon=True).start()

    def ended(self, job: str) -> str | None:
        """See `Engine.ended`."""
        return self._over.get(job)

    def forget(self, job: str) -> None:
        """Stop watching a job."""
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
