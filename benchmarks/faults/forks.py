"""Kill trainers, link and driver of runs over sites a thousand times; hold what comes out to a plain run.

    python benchmarks/faults/forks.py --kills 1000 --output benchmarks/faults/results/forks.jsonl
    python benchmarks/faults/forks.py --show benchmarks/faults/results/forks.jsonl

`run.py` kills a whole federation, which takes half a minute for each kill. Here driver, trainers and the link
between them are fedflame's own, as processes forked from this one, and what an engine does between hub and
sites is a thread for each request in the link's process. One run is killed (SIGKILL) several times, each time
one process drawn at random, at instants drawn from an exponential distribution. What is killed is started
again at once; the driver by `--resume`. A run must end, leave no site out, and give the bytes of a run in one
process. A line of the results is a run, so that the program can be stopped and goes on where it was.
"""

from __future__ import annotations

import argparse
import ctypes
import io
import json
import os
import random
import selectors
import signal
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console

from fedflame.cli import app
from fedflame.commands.quiet import quiet_libraries
from fedflame.commands.run import print_run
from fedflame.config.load import load_config
from fedflame.engines.hub import Hub
from fedflame.engines.link import HubLink
from fedflame.experiment.prepare import prepare
from fedflame.experiment.sites import Sites
from fedflame.trainer.ask import PATIENCE_SECONDS, answer_pieces
from fedflame.trainer.server import serve
from fedflame.trainer.service import TrainerService
from fedflame.trainer.site import load_site
from fedflame.trainer.unix_socket import listening

SITES = {"north": 8, "south": 4, "west": 2}
SETTINGS = (
    "data.max_rows=500",
    "clients.num_clients=3",
    "clients.active_experts=8,4,2",
    "training.max_steps=4",
    "server.num_server_rounds=6",
    "evaluation.rows_per_category=1",
    "evaluation.max_new_tokens=0",
)
MEAN_SECONDS = 1.5
"""Between two kills of a run."""
LONGEST_SECONDS = 600.0
TARGETS = ("trainer", "link", "driver")
DIES_WITH_PARENT = 1
"""PR_SET_PDEATHSIG of Linux."""


def forked(work: Callable[[], object]) -> int:
    """Start a process that does this work, and ends with the one that has started it."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        ctypes.CDLL(None).prctl(DIES_WITH_PARENT, signal.SIGKILL)
        work()
        code = 0
    except BaseException as error:
        print(f"{error!r}"[:500], file=sys.stderr, flush=True)
    finally:
        os._exit(code)


@dataclass(frozen=True)
class Asking:
    """The engine of the driver: it asks the program that has forked it, which starts and ends links."""

    control: Path

    def submit(self, hub_socket: Path, job_key: str) -> str:
        return str(self._ask("submit", str(hub_socket), job_key))

    def ended(self, job: str) -> str | None:
        return None if self._ask("alive", job) else "the link has ended"

    def stop(self, job: str) -> None:
        self._ask("stop", job)

    def connected(self) -> set[str]:
        return set(SITES)

    def _ask(self, *words: str) -> Any:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(self.control))
            connection.sendall(json.dumps(words).encode() + b"\n")
            return json.loads(connection.makefile().readline())


def link(hub_socket: str, job_key: str, doors: dict[str, Path]) -> None:
    """Carry every request to its site, on a thread of its own."""
    to_hub = HubLink(Path(hub_socket), job_key)

    def carry(ticket: str, site: str, content: Any) -> None:
        with suppress(OSError):
            to_hub.answered(ticket, site, b"".join(answer_pieces(doors[site], [content], PATIENCE_SECONDS)))

    to_hub.sites(set(doors))
    while (request := to_hub.next_request()) is not None:
        threading.Thread(target=carry, args=request, daemon=True).start()


def trainer(file: Path) -> NoReturn:
    """Serve one site, as `fedflame trainer` does."""
    site = load_site(file)
    with listening(site.socket_path) as listener:
        serve(listener, TrainerService(site, lambda _: None), lambda _: None)
    raise SystemExit("the trainer has ended")


@dataclass
class Supervisor:
    """The processes of one run, which are killed and started again."""

    folder: Path
    output: Path
    control: socket.socket
    trainers: dict[str, int] = field(default_factory=dict)
    links: dict[int, bool] = field(default_factory=dict)
    """Process -> whether it runs."""
    driver: int = 0
    code: int | None = None
    """The exit code of a driver that was not killed."""

    def start_trainer(self, name: str) -> None:
        self.trainers[name] = forked(lambda: trainer(self.folder / name / "site.toml"))

    def start_driver(self) -> None:
        resumes = (self.output / "config.json").exists()
        self.driver = forked(lambda: self._drive(resumes))

    def _drive(self, resumes: bool) -> None:
        config = load_config(None, [*SETTINGS, f"output_dir={self.output}"])
        sites = Sites(Hub(sites=tuple(SITES)), Asking(self.folder / "control"))
        prepared = prepare(config, "resume" if resumes else "refuse", sites)
        print_run(prepared, "", Console(file=io.StringIO()))

    def kill(self, target: str, rng: random.Random) -> bool:
        """Whether there was such a process."""
        running = [pid for pid, alive in self.links.items() if alive]
        pids = {"trainer": [*self.trainers.values()], "link": running, "driver": [self.driver]}[target]
        if not pids:
            return False
        os.kill(rng.choice(pids), signal.SIGKILL)
        return True

    def reap(self) -> None:
        """Start again what has ended, but for a driver that ended by itself, and links, which it submits."""
        for pid, status in ended_children():
            if pid in self.links:
                self.links[pid] = False
            for name in [name for name, other in self.trainers.items() if other == pid]:
                self.start_trainer(name)
            if pid == self.driver and os.WIFSIGNALED(status):
                self.start_driver()
            elif pid == self.driver:
                self.code = os.waitstatus_to_exitcode(status)

    def answer(self) -> None:
        """Answer one request of the driver."""
        connection, _ = self.control.accept()
        with connection, suppress(OSError, ValueError):
            connection.settimeout(5)
            what, *words = json.loads(connection.makefile().readline())
            if what == "submit":
                doors = {name: load_site(self.folder / name / "site.toml").socket_path for name in SITES}
                pid = forked(lambda: link(words[0], words[1], doors))
                self.links[pid] = True
                reply: Any = pid
            elif what == "stop":
                reply = self.stop(int(words[0]))
            else:
                reply = self.links.get(int(words[0]), False)
            connection.sendall(json.dumps(reply).encode() + b"\n")

    def stop(self, pid: int) -> bool:
        if self.links.get(pid):
            os.kill(pid, signal.SIGKILL)
        return True

    def end(self) -> None:
        """Kill all that is left."""
        left = [*self.trainers.values(), *(pid for pid, alive in self.links.items() if alive), self.driver]
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with suppress(ChildProcessError):
            while True:
                os.waitpid(-1, 0)


def ended_children() -> Iterator[tuple[int, int]]:
    """Yield process and status of all that have ended."""
    with suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            yield ended


@contextmanager
def supervised(folder: Path, output: Path) -> Iterator[Supervisor]:
    path = folder / "control"
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as control:
        control.bind(str(path))
        control.listen()
        supervisor = Supervisor(folder, output, control)
        try:
            yield supervisor
        finally:
            supervisor.end()


def one_run(folder: Path, number: int) -> dict[str, Any]:
    """A run that is killed again and again until it has ended."""
    rng = random.Random(number)
    begun, killed = time.monotonic(), list[list[Any]]()
    with tempfile.TemporaryDirectory(dir=folder) as place, supervised(folder, Path(place) / "run") as these:
        for name in SITES:
            these.start_trainer(name)
        these.start_driver()
        due = begun + rng.expovariate(1 / MEAN_SECONDS)
        with selectors.DefaultSelector() as waiting:
            waiting.register(these.control, selectors.EVENT_READ)
            while these.code is None and time.monotonic() - begun < LONGEST_SECONDS:
                if waiting.select(max(0.0, min(0.05, due - time.monotonic()))):
                    these.answer()
                these.reap()
                if time.monotonic() >= due and these.code is None:
                    target = rng.choice(TARGETS)
                    if these.kill(target, rng):
                        killed.append([target, round(time.monotonic() - begun, 2)])
                    due = time.monotonic() + rng.expovariate(1 / MEAN_SECONDS)
        return {
            "run": number,
            "killed": killed,
            "exit_code": these.code,
            "left_out": left_out(these.output),
            "bytes": run_bytes(these.output),
            "seconds": round(time.monotonic() - begun, 1),
        }


def left_out(run: Path) -> list[list[Any]]:
    """Round, client and reason."""
    file = run / "metrics.jsonl"
    lines = map(json.loads, file.read_text().splitlines()) if file.exists() else ()
    return [[line["round"], line["client"], line["reason"]] for line in lines if line["event"] == "excluded"]


def run_bytes(run: Path) -> str:
    """The adapter of a finished run, in hex; empty where there is none."""
    import hashlib

    path = run / "adapter" / "adapter_model.safetensors"
    return hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest() if path.exists() else ""


def prepared_folder(folder: Path) -> str:
    """Give every site its rows and its file; return the bytes of a run in one process."""
    config = load_config(None, [*SETTINGS, f"output_dir={folder / 'plain'}"])
    settings = [part for setting in SETTINGS for part in ("--set", setting)]
    split = ["split", "--output-dir", str(folder / "silos"), *settings]
    os.waitpid(forked(lambda: app(split, standalone_mode=False)), 0)
    for client, (name, k) in enumerate(SITES.items()):
        (folder / name).mkdir()
        (folder / name / "site.toml").write_text(
            f'name = "{name}"\n[data]\ndataset_name = "{folder}/silos/client-{client}.jsonl"\n'
            f'[trainer]\nactive_experts = {k}\n[models]\n"olmoe-tiny" = "olmoe-tiny"\n'
        )
    os.waitpid(forked(lambda: print_run(prepare(config), "", Console(file=io.StringIO()))), 0)
    return run_bytes(folder / "plain")


def show(lines: list[dict[str, Any]]) -> str:
    targets = Counter(target for line in lines for target, _ in line["killed"])
    same = sum(line["same_bytes"] for line in lines)
    whole = [line for line in lines if not line["left_out"]]
    kills = ", ".join(f"{targets[target]} of a {target}" for target in TARGETS)
    return (
        f"{sum(targets.values())} kills in {len(lines)} runs: {kills}. {len(whole)} counted all replies, "
        f"{sum(line['same_bytes'] for line in whole)} of them, and {same} of all, with the bytes of a run in "
        f"one process. {sum(line['exit_code'] != 0 for line in lines)} did not end well."
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--show", type=Path, help="sum these results up, and kill nothing")
    given = parser.parse_args()
    if given.show:
        print(show([json.loads(line) for line in given.show.read_text().splitlines()]))
        return
    os.environ["OMP_NUM_THREADS"] = "1"
    quiet_libraries()
    there = given.output.read_text().splitlines() if given.output and given.output.exists() else []
    lines = [json.loads(line) for line in there]
    with tempfile.TemporaryDirectory(prefix="ff-", dir="/tmp") as name:
        wanted = prepared_folder(Path(name))
        while sum(len(line["killed"]) for line in lines) < given.kills:
            line = one_run(Path(name), len(lines))
            line["same_bytes"] = line.pop("bytes") == wanted != ""
            lines.append(line)
            print(json.dumps(line), flush=True)
            if given.output:
                with given.output.open("a") as file:
                    file.write(json.dumps(line) + "\n")
    print(show(lines))


if __name__ == "__main__":
    main()
