"""Start a process again whenever it crashes, until it crashes too often."""

from __future__ import annotations

import ctypes
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Sequence

from fedflame.errors import USER_ERROR, UserError

PAUSE_SECONDS = 1.0
CRASHES, WITHIN_SECONDS = 5, 60.0
_SET_PARENT_DEATH_SIGNAL = 1


def supervise(command: Sequence[str], say: Callable[[str], None]) -> None:
    """Run the command until it ends by itself; it never outlives this process.

    Raises:
        UserError: its input cannot be used, which a restart does not mend, or it crashed `CRASHES` times
            within `WITHIN_SECONDS`.
    """
    crashes: deque[float] = deque(maxlen=CRASHES)
    while True:
        process = subprocess.Popen(command, preexec_fn=_end_with_the_parent)
        try:
            code = process.wait()
        except BaseException:
            process.terminate()
            process.wait()
            raise
        if code == 0:
            return
        if code == USER_ERROR:
            raise UserError("the trainer cannot start; see the line above")
        crashes.append(time.monotonic())
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        if len(crashes) == CRASHES and crashes[-1] - crashes[0] < WITHIN_SECONDS:
            raise UserError(f"the trainer ended {CRASHES} times within {WITHIN_SECONDS:.0f} s, last by {how}")
        say(f"the trainer ended by {how}; it is started again")
        time.sleep(PAUSE_SECONDS)


def _end_with_the_parent() -> None:
    """In the child: be killed when the supervisor is, so that no trainer is left without one."""
    ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
