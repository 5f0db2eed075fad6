r"""What a round over sites costs beyond training: seconds, and the memory of every process.

    python benchmarks/round-overhead/run.py --engine nvflare \
        --output benchmarks/round-overhead/results/nvflare.json
    python benchmarks/round-overhead/run.py --engine flower \
        --output benchmarks/round-overhead/results/flower.json

A federation on loopback as in examples/loopback.py or examples/loopback_flower.py, with the real driver,
engine, envelopes and sockets, and TLS; only the trainers are stand-ins, which answer at once. A round is the
time from the first plan to the last answer of `EngineClients.train`. Updates are random bytes of the size
asked for, which nobody decodes; of a plan as large every value is another in every round, so that all of it
travels. Every setting has a federation and a driver of its own.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import secrets
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from fedflame.engines.clients import EngineClients
from fedflame.engines.engine import Engine
from fedflame.engines.flower.engine import FlowerEngine
from fedflame.engines.hub import HubRounds, load_hub
from fedflame.engines.jobs import engine_jobs
from fedflame.engines.nvflare.engine import NvflareEngine
from fedflame.experiment.environment import environment
from fedflame.wire.buffer import pack
from fedflame.wire.frame import seal
from loopback import Loopback, Service, descendants, federation
from loopback_flower import flower_federation

MEGABYTE = 1_000_000
SETTINGS = ("4x1", "4x10", "4x100", "2x500")
STAND_IN = Path(__file__).with_name("stand_in_trainer.py")
EXPERTS = 50
LOOK_SECONDS = 0.2
CLOCK_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Running:
    """Sites that are connected, over an engine."""

    engine: Engine
    processes: Callable[[], dict[str, list[int]]]
    """Those of hub and sites by what they are; some of them live for a job or a message."""


StartTrainer = Callable[[Loopback, str, Path], None]
"""See `loopback.federation`."""


@contextmanager
def over_nvflare(folder: Path, sites: Sequence[str], start_trainer: StartTrainer) -> Iterator[Running]:
    with federation(folder, sites, start_trainer) as found:
        names = ("server parent", "server job", "site parent", "client job")
        yield Running(NvflareEngine(load_hub(found.hub_file)), partial(processes, found, "server", names))


@contextmanager
def over_flower(folder: Path, sites: Sequence[str], start_trainer: StartTrainer) -> Iterator[Running]:
    with flower_federation(folder, sites, start_trainer) as found:
        names = ("SuperLink", "ServerApp", "SuperNode", "ClientApp")
        yield Running(FlowerEngine(load_hub(found.hub_file)), partial(processes, found, "superlink", names))


def processes(found: Loopback, hub: str, names: tuple[str, str, str, str]) -> dict[str, list[int]]:
    """Those of the hub's service, of the sites' engines, what each has started, and the trainers.

    Args:
        found: what runs.
        hub: the name of the hub's service.
        names: of the hub's process and those that it has started, of a site's and those that it has started.
    """
    pids = {name: service.process.pid for name, service in found.services.items()}
    engines = [pid for name, pid in pids.items() if name.endswith(" engine")]
    started = [pid for engine in engines for pid in descendants(engine)]
    return {
        **dict(zip(names, ([pids[hub]], descendants(pids[hub]), engines, started), strict=True)),
        "stand-in trainer": [pid for name, pid in pids.items() if name.endswith(" trainer")],
    }


ENGINES: dict[str, Callable[[Path, Sequence[str], StartTrainer], AbstractContextManager[Running]]] = {
    "nvflare": over_nvflare,
    "flower": over_flower,
}
PACKAGES = {"nvflare": "nvflare", "flower": "flwr"}


class Usage:
    """Most memory and all CPU seconds of processes by what they are, looked at several times a second.

    Of a process that ends, what it used since the last look is not seen.
    """

    def __init__(self, running: Running) -> None:
        self._running = running
        self._done = threading.Event()
        self._peaks: dict[str, float] = {}
        self._first: dict[tuple[str, int], float] = {}
        self._last: dict[tuple[str, int], float] = {}
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Usage:
        self._look()
        self._first = dict(self._last)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self._look()

    def peak_megabytes(self) -> dict[str, float]:
        """The most resident memory that one of the processes had since it began."""
        return {role: round(peak, 1) for role, peak in self._peaks.items()}

    def cpu_seconds(self) -> dict[str, float]:
        """That the processes have used, kernel included."""
        used = dict.fromkeys(self._peaks, 0.0)
        for (role, pid), seconds in self._last.items():
            used[role] += seconds - self._first.get((role, pid), 0.0)
        return used

    def _watch(self) -> None:
        while not self._done.wait(LOOK_SECONDS):
            self._look()

    def _look(self) -> None:
        for role, pids in {"driver": [os.getpid()], **self._running.processes()}.items():
            self._peaks.setdefault(role, 0.0)
            for pid in pids:
                with suppress(OSError, StopIteration):  # it has just ended
                    self._last[role, pid] = cpu_seconds(pid)
                    self._peaks[role] = max(self._peaks[role], peak_megabytes(pid))


def peak_megabytes(pid: int) -> float:
    """The most resident memory that the process had."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    kibibytes = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    return kibibytes * 1024 / MEGABYTE


def cpu_seconds(pid: int) -> float:
    """That the process has used, kernel included."""
    *_, user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:13]
    return (int(user) + int(system)) / CLOCK_TICKS


def measure(engine: str, setting: str, rounds: int) -> dict[str, Any]:
    """All rounds of one setting, such as `4x100`: sites and megabytes."""
    count, megabytes = map(int, setting.split("x"))
    size, sites = megabytes * MEGABYTE, [f"site-{number}" for number in range(1, count + 1)]
    with tempfile.TemporaryDirectory(prefix="fedflame-overhead-") as name:
        folder, requests = Path(name) / "federation", Path(name) / "requests"
        folder.mkdir()
        requests.mkdir()

        def start_trainer(found: Loopback, site: str, _kit: Path) -> None:
            place = folder / site
            place.mkdir(exist_ok=True)
            command = [sys.executable, str(STAND_IN), str(place / "trainer.sock"), site, str(size)]
            found.services[f"{site} trainer"] = Service("trainer", command, place, {})

        with (
            ENGINES[engine](folder, sites, start_trainer) as running,
            engine_jobs(running.engine, print) as jobs,
        ):
            clients = EngineClients(
                engine=running.engine, engine_jobs=jobs, run=secrets.token_hex(16), job={}, sites=sites,
                rounds=HubRounds(), quorum=count, folder=requests, say=print,
            )  # fmt: skip
            measured = all_rounds(clients, running, size, rounds)
    return {"sites": count, "megabytes": megabytes, **measured, "load_average": round(os.getloadavg()[0], 1)}


def all_rounds(clients: EngineClients, running: Running, size: int, rounds: int) -> dict[str, Any]:
    """Seconds and CPU seconds of rounds, and what the processes have needed at most by their end."""
    first = one_round(clients, size)
    with Usage(running) as usage:
        later = [one_round(clients, size) for _ in range(rounds - 1)]
    used = usage.cpu_seconds()
    return {
        "seconds": round(median(later), 2),
        "later_rounds": [round(seconds, 2) for seconds in later],
        "first_round": round(first, 2),
        "cpu_seconds_per_round": {role: round(seconds / len(later), 2) for role, seconds in used.items()},
        "peak_megabytes": usage.peak_megabytes(),
    }


def a_plan(size: int) -> bytes:
    """One bank of experts with random values, sealed."""
    values = torch.frombuffer(bytearray(os.urandom(size)), dtype=torch.float32)
    return seal(pack({"0.A1": values.view(EXPERTS, -1)}, {}))


def one_round(clients: EngineClients, size: int) -> float:
    """Seconds of a round in which every site must answer."""
    plan = a_plan(size)
    plans = ((client, plan) for client in range(len(clients.sites)))
    begun = time.monotonic()
    for answer in clients.train(plans, lambda tokens: None):
        if answer.failure or len(answer.update) != size:
            raise SystemExit(answer.failure or f"an update of {len(answer.update)} bytes")
    return time.monotonic() - begun


def end_by_exception() -> None:
    """Let SIGTERM unwind as Ctrl-C does, so that no service is left behind."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))


def table(measured: Sequence[dict[str, Any]]) -> str:
    """In Markdown: seconds, and for each process the memory of the site with most."""
    roles = list(measured[0]["peak_megabytes"])
    head = ["sites x MB", "seconds", "least to most", "first round", *roles]
    rows = [
        [
            f"{setting['sites']} x {setting['megabytes']}", f"{setting['seconds']:.2f}",
            f"{min(setting['later_rounds']):.2f} to {max(setting['later_rounds']):.2f}",
            f"{setting['first_round']:.1f}",
            *(f"{setting['peak_megabytes'][role]:,.0f}" for role in roles),
        ]
        for setting in measured
    ]  # fmt: skip
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--engine", choices=list(ENGINES), default="nvflare")
    parser.add_argument("--settings", default=",".join(SETTINGS), help="sites x megabytes, comma-separated")
    parser.add_argument("--rounds", type=int, default=8, help="of which the first is reported apart")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    measured = []
    end_by_exception()
    for setting in given.settings.split(","):
        # A process each, because a peak of memory is that of a whole life.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), end_by_exception) as driver:
            measured.append(driver.submit(measure, given.engine, setting, given.rounds).result())
        print(json.dumps(measured[-1]), flush=True)
    result = {
        "engine": given.engine,
        "environment": environment() | {given.engine: version(PACKAGES[given.engine])},
        "settings": measured,
    }
    if given.output:
        given.output.write_text(json.dumps(result, indent=1) + "\n")
    print(table(measured))


if __name__ == "__main__":
    main()
