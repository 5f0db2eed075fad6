"""A hub and three sites on this machine, over NVIDIA FLARE with mutual TLS: one command, one experiment.

    pip install '.[nvflare]'
    python examples/loopback.py

The program uses the same commands as on four machines. `fedflame hub init` makes the kits. `fedflame split`
writes the rows of each client to a file. Each site runs `fedflame site init` and a trainer. `fedflame run
--engine nvflare` runs the experiment. At the end the same experiment runs in one process, and both adapters
must have the same bytes. Servers listen on loopback only and end with this program.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

FEDFLAME = (sys.executable, "-m", "fedflame")
SITES = ("site-1", "site-2", "site-3")
KS = (8, 4, 1)
START_SECONDS = 120.0
EXPERIMENT = """\
[clients]
num_clients = 3
active_experts = "8,4,1"

[training]
max_steps = 10

[server]
num_server_rounds = 4
"""


class Service:
    """A process that is restarted whenever it ends, as systemd would do, until `stop`."""

    def __init__(self, name: str, command: Sequence[str], folder: Path, environment: dict[str, str]) -> None:
        self.name, self._command, self._folder = name, command, folder
        self._environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
        self._stopping = threading.Event()
        self.process = self._start()
        self._watch = threading.Thread(target=self._restart, daemon=True)
        self._watch.start()

    def _start(self) -> subprocess.Popen[bytes]:
        with (self._folder / f"{self.name}.log").open("ab") as log:
            return subprocess.Popen(
                self._command,
                cwd=self._folder,
                env=self._environment,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
            )

    def _restart(self) -> None:
        while True:
            self.process.wait()
            if self._stopping.wait(1.0):
                return
            self.process = self._start()

    def stop(self) -> None:
        """End the process and all its descendants."""
        self._stopping.set()
        family = [self.process.pid, *descendants(self.process.pid)]
        for number, patience in ((signal.SIGTERM, 10.0), (signal.SIGKILL, 10.0)):
            for pid in family:
                _signal(pid, number)
            deadline = time.monotonic() + patience
            while any(alive(pid) for pid in family) and time.monotonic() < deadline:
                time.sleep(0.1)
                self.process.poll()


@dataclass
class Loopback:
    """A running federation on this machine: its folder and its services."""

    folder: Path
    hub_file: Path
    engine: str
    address: str
    """Host and port of the hub."""
    services: dict[str, Service] = field(default_factory=dict)

    def run(self, config: Path, output: Path, *more: str) -> subprocess.CompletedProcess[str]:
        """Run `fedflame run` over the sites."""
        return fedflame(
            "run", config, "--engine", self.engine, "--hub", self.hub_file, "--output-dir", output, *more
        )

    def start_trainer(self, site: str, place: Path) -> None:
        """Start the trainer of a site whose file is in `place`."""
        command = [*FEDFLAME, "trainer", "--site", str(place / "site.toml")]
        self.services[f"{site} trainer"] = Service("trainer", command, place, {})

    def stop(self) -> None:
        """Everything, the last first."""
        for service in reversed(list(self.services.values())):
            service.stop()


Federate = Callable[[Path, Path], AbstractContextManager[Loopback]]


def fedflame(*arguments: str | Path, quiet: bool = True) -> subprocess.CompletedProcess[str]:
    """Run the fedflame command with one thread, so that all processes compute the same bytes."""
    return subprocess.run(
        [*FEDFLAME, *map(str, arguments)], env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True, check=False,
        stdout=subprocess.PIPE if quiet else None, stderr=subprocess.STDOUT if quiet else None,
    )  # fmt: skip


def must(done: subprocess.CompletedProcess[str]) -> None:
    """End this program with the command's output if the command failed."""
    if done.returncode:
        raise SystemExit(f"{' '.join(done.args[2:])}\n{done.stdout}")


@contextmanager
def loopback(folder: Path, config: Path, *overrides: str) -> Iterator[Loopback]:
    """Start the federation of an experiment, with a trainer at each site; yield it when all parts are ready.

    Args:
        folder: an empty folder, for the folders of the hub and the sites.
        config: the experiment, with one client per site.
        overrides: `--set` and its values, for `split`.
    """
    must(fedflame("split", config, "--output-dir", folder / "silos", *overrides))

    def start_trainer(found: Loopback, site: str, kit: Path) -> None:
        client, place = SITES.index(site), folder / site
        data = folder / "silos" / f"client-{client}.jsonl"
        must(fedflame("site", "init", place, "--kit", kit, "--data", data,
                      "--active-experts", str(KS[client]), "--allow-model", "olmoe-tiny"))  # fmt: skip
        allow_scoring(place, folder / "silos" / "test" / data.name)
        found.start_trainer(site, place)

    with federation(folder, SITES, start_trainer) as found:
        wait_until_good([("site", "check", folder / site / "site.toml") for site in SITES])
        yield found


@contextmanager
def federation(
    folder: Path, sites: Sequence[str], start_trainer: Callable[[Loopback, str, Path], None]
) -> Iterator[Loopback]:
    """Provision, start all services, and wait until all sites are connected; stop all services at the end.

    Args:
        folder: the folder for the folders of the hub and the sites.
        sites: the names of the sites.
        start_trainer: called with the federation, a site and its kit; starts a service that listens at
            `trainer.sock` in the site's folder.
    """
    hub, port = folder / "hub", free_port()
    must(fedflame("hub", "init", hub, "--sites", ",".join(sites), "--host", "localhost", "--port", port,
                  "--admin", "researcher@hub.example"))  # fmt: skip
    found = Loopback(folder, hub / "hub.toml", "nvflare", f"localhost:{port}")
    try:
        kits = hub / "kits"
        found.services["server"] = _engine("server", kits / "localhost", {})
        for site in sites:
            start_trainer(found, site, kits / site)
            found.services[f"{site} engine"] = _engine(
                "engine", kits / site, {"FEDFLAME_TRAINER": str(folder / site / "trainer.sock")}
            )
        wait_until_good([("hub", "check", found.hub_file)])
        yield found
    finally:
        found.stop()


def _engine(name: str, kit: Path, environment: dict[str, str]) -> Service:
    search = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return Service(name, ["bash", "startup/sub_start.sh", "--once"], kit, {"PATH": search, **environment})


def allow_scoring(place: Path, rows: Path) -> None:
    """Name rows in a site's file that the hub may have scored there, if `fedflame split` has written any."""
    if rows.exists():
        file = place / "site.toml"
        file.write_text(file.read_text().replace("[data]\n", f'[data]\ntest_dataset_name = "{rows}"\n'))


def wait_until_good(checks: Sequence[Sequence[str | Path]]) -> None:
    """Repeat each of these commands until it succeeds."""
    deadline = time.monotonic() + START_SECONDS
    for check in checks:
        while (done := fedflame(*check)).returncode:
            if time.monotonic() > deadline:
                raise SystemExit(f"not all is there after {START_SECONDS:.0f} s:\n{done.stdout}")
            time.sleep(1)


def descendants(pid: int) -> list[int]:
    """Return the ids of all descendants of a process; empty if it has ended."""
    try:
        return [child.pid for child in psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def alive(pid: int) -> bool:
    """Return whether the process runs; a zombie does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _signal(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def free_port() -> str:
    """Return a port of this machine that was free a moment ago."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def compare(description: str, federate: Federate, default_output: Path) -> None:
    """Set up a federation, run an experiment over its sites and in one process, and compare the adapters.

    Args:
        description: the text for `--help`.
        federate: starts a federation, given an empty folder and an experiment.
        default_output: folder for both runs.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "config", nargs="?", type=Path, help="experiment of three clients; a small one without it"
    )
    parser.add_argument("--output-dir", type=Path, default=default_output, help="not there yet")
    given = parser.parse_args()
    if given.output_dir.exists():
        raise SystemExit(f"{given.output_dir}: exists already")
    given.output_dir.mkdir(parents=True)
    config = given.config or given.output_dir / "experiment.toml"
    if given.config is None:
        config.write_text(EXPERIMENT)
    with tempfile.TemporaryDirectory(prefix="fedflame-loopback-") as folder:
        print("setting up a hub and three sites", flush=True)
        with federate(Path(folder), config) as federation:
            print(fedflame("hub", "check", federation.hub_file, config).stdout, flush=True)
            done = fedflame("run", config, "--engine", federation.engine, "--hub", federation.hub_file,
                            "--output-dir", given.output_dir / "sites", quiet=False)  # fmt: skip
            if done.returncode:
                shutil.copytree(folder, given.output_dir / "federation")
                raise SystemExit(f"the run failed; logs are in {given.output_dir}/federation")
    print("the same in one process", flush=True)
    must(fedflame("run", config, "--output-dir", given.output_dir / "one-process"))
    adapters = [
        given.output_dir / run / "adapter" / "adapter_model.safetensors" for run in ("sites", "one-process")
    ]
    if adapters[0].read_bytes() != adapters[1].read_bytes():
        raise SystemExit("the adapters differ")
    print(f"the adapter of three sites is that of one process, byte for byte: {adapters[0]}")


if __name__ == "__main__":
    compare((__doc__ or "").splitlines()[0], loopback, Path("runs/loopback"))
