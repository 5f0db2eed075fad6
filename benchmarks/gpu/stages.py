"""The stages, and a process of its own for each: what breaks a card's context, or hangs, ends with it."""

from __future__ import annotations

import json
import multiprocessing
import multiprocessing.connection
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import block
import ceilings
import correctness
import losses
import parts
import products
import step
import torch
from findings import Findings, failure
from sizes import Sizes

from fedflame.base.device import choose_device, device_facts
from fedflame.experiment.environment import environment

START = {"cpu": "fork", "cuda": "spawn"}
"""A forked process cannot use a card that its parent has touched; on a CPU it saves importing again."""


@dataclass(frozen=True)
class Stage:
    measure: Callable[[Sizes, Findings], None]
    budget: int
    """Seconds after which it is stopped on a card, but for those that stages before it have left."""


def device(sizes: Sizes, findings: Findings) -> None:
    facts = environment() | device_facts(choose_device(sizes.device))
    facts["triton"] = version("triton") if find_spec("triton") else None
    findings.add("device", **facts)


DEVICE = "device"
STAGES = {
    DEVICE: Stage(device, 30),
    "ceilings": Stage(ceilings.measure, 15),
    "correctness": Stage(correctness.measure, 130),
    "products": Stage(products.measure, 40),
    "block": Stage(block.measure, 50),
    "step": Stage(step.measure, 180),
    "parts": Stage(parts.measure, 20),
    "losses": Stage(losses.measure, 130),
}
"""In the order in which they run: ten minutes at most."""


class StageProcess:
    """A stage in its process, which imports at once, and measures when `finish` is called."""

    def __init__(self, name: str, sizes: Sizes) -> None:
        context = multiprocessing.get_context(START[sizes.device])
        self.name = name
        self._pipe, there = context.Pipe()
        self._process: Any = context.Process(target=_run, args=(name, sizes, there))
        self._process.start()
        there.close()

    def finish(self, file: Path, budget: float) -> dict[str, Any]:
        """Let the stage run for so many seconds at most; return what it found, which is in the file."""
        Findings(file).write()  # no other than this stage's, whatever happens to it
        with suppress(EOFError):  # it has ended already
            self._pipe.recv()  # everything is imported
            self._pipe.send(file)
        self._process.join(budget)
        if self._process.is_alive():
            self.stop()
            return _ended(file, f"stopped after {budget:.0f} s, its budget")
        return _ended(file, f"exit code {self._process.exitcode}" if self._process.exitcode else "")

    def stop(self) -> None:
        """End the process, with those that it has started to compile."""
        if self._process.is_alive():
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.join()


def in_turn(names: Sequence[str], sizes: Sizes) -> Iterator[StageProcess]:
    """Yield the process of each stage; each is started while the one before it measures."""
    started: list[StageProcess] = []
    try:
        for name in names:
            started.append(StageProcess(name, sizes))
            yield from started[-2:-1]
        yield started[-1]
    finally:
        for process in started:
            process.stop()


def _run(name: str, sizes: Sizes, pipe: Any) -> None:
    os.setsid()
    pipe.send("ready")
    parent: Any = multiprocessing.parent_process()
    if pipe not in multiprocessing.connection.wait([pipe, parent.sentinel]):
        return
    torch.set_num_threads(1)  # on a CPU `seconds` reads the time of one thread
    findings = Findings(pipe.recv())
    with findings.attempt("the stage"):
        STAGES[name].measure(sizes, findings)
    findings.write()


def _ended(file: Path, problem: str) -> dict[str, Any]:
    """Return what is in the file, with the problem of the process, if there is one."""
    found: dict[str, Any] = json.loads(file.read_text())
    return found | {"failures": found["failures"] + [failure("the process", problem)] * bool(problem)}
