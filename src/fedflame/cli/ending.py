"""How a command ends that is told to: Ctrl-C, SIGTERM and SIGHUP unwind it alike, as a KeyboardInterrupt."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import typer

from fedflame.clients.fork_server import SIGNALS

_STREAMS = (1, 2)
"""Descriptors of stdout and stderr."""
_IS_ENDING = b"fedflame: it is ending; another Ctrl-C ends it at once, as it is\n"


class _Told:
    """What the command has been told so far."""

    def __init__(self) -> None:
        self.by: signal.Signals | None = None
        """The signal that ends the command; None for none."""
        self._impatient = False
        self._terminals = [stream for stream in _STREAMS if os.isatty(stream)]

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Unwind the command at the first signal. Later ones leave it to end, but for a third Ctrl-C."""
        if self.by is None:
            self.by = signal.Signals(number)
            self._let_go_of_terminals()
            raise KeyboardInterrupt
        if number != signal.SIGINT:
            return
        if self._impatient:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self._impatient = True
        os.write(2, _IS_ENDING)

    def _let_go_of_terminals(self) -> None:
        """Write to nowhere from now on where the terminal has gone, so that no last line ends in an error."""
        for stream in self._terminals:
            if not os.isatty(stream):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream)
                os.close(nowhere)


@contextmanager
def ends_when_told() -> Iterator[None]:
    """The body of a command, which a signal ends in one line with what its KeyboardInterrupt says.

    A signal that is ignored, as SIGHUP is under nohup, stays ignored. After a signal, the process is about to
    end, and further ones do not end it before.

    Raises:
        typer.Exit: with 128 and the number of the signal.
    """
    told = _Told()
    before = {number: signal.getsignal(number) for number in SIGNALS}
    handled = [number for number in SIGNALS if before[number] is not signal.SIG_IGN]
    for number in handled:
        signal.signal(number, told)
    try:
        yield
    except KeyboardInterrupt as error:
        by = told.by or signal.SIGINT
        what = "interrupted" if by == signal.SIGINT else f"ended by {by.name}"
        print(f"fedflame: {what}{str(error) and '; '}{error}", file=sys.stderr)
        raise typer.Exit(128 + by) from error
    finally:
        for number in handled:
            if told.by is None:
                signal.signal(number, before[number])
            elif number != signal.SIGINT:  # while Python ends, it takes our handlers away, but leaves this
                signal.signal(number, signal.SIG_IGN)
