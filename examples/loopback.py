"""A hub and three sites on this machine, over NVIDIA FLARE with mutual TLS: one command, one experiment.

    pip install '.[nvflare]'
    python examples/loopback.py

Everything is done as on four machines, by the same commands: kits from `fedflame hub init`, the rows of each
client in a file of its own by `fedflame split`, `fedflame site init` and a resident trainer per site, and
`fedflame run --engine nvflare`. At the end the same experiment runs in one process, and the adapters must be
the same bytes. Servers listen on loopback only and end with this program.
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
    """A process that is started again whenever it ends, as systemd would, until `stop`."""

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
        """End the process and all that it has started."""
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
    """The folder with everything, and the services that run."""

    folder: Path
    hub_file: Path
    engine: str
    address: str
    """Host and port of the hub."""
    services: dict[str, Service] = field(default_factory=dict)

    def run(self, config: Path, output: Path, *more: str) -> subprocess.CompletedProcess[str]:
        """`fedflame run` over the sites."""
        return fedflame(
            "run", config, "--engine", self.engine, "--hub", self.hub_file, "--output-dir", output, *more
        )

    def start_trainer(self, site: str, place: Path) -> None:
        """The resident trainer of a site whose file is in `place`."""
        command = [*FEDFLAME, "trainer", "--site", str(place / "site.toml")]
        self.services[f"{site} trainer"] = Service("trainer", command, place, {})

    def stop(self) -> None:
        """Everything, the last first."""
        for service in reversed(list(self.services.values())):
            service.stop()


Federate = Callable[[Path, Path], AbstractContextManager[Loopback]]


def fedflame(*arguments: str | Path, quiet: bool = True) -> subprocess.CompletedProcess[str]:
    """The command, with one thread so that every process computes the same bytes."""
    return subprocess.run(
        [*FEDFLAME, *map(str, arguments)], env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True, check=False,
        stdout=subprocess.PIPE if quiet else None, stderr=subprocess.STDOUT if quiet else None,
    )  # fmt: skip


def must(done: subprocess.CompletedProcess[str]) -> None:
    """End this program with the command's own words where it failed."""
    if done.returncode:
        raise SystemExit(f"{' '.join(done.args[2:])}\n{done.stdout}")


@contextmanager
def loopback(folder: Path, config: Path, *overrides: str) -> Iterator[Loopback]:
    """The federation of an experiment, each site with its trainer, once all is there.

    Args:
        folder: empty; what the hub and the sites have goes below it.
        config: the experiment, with one client per site.
        overrides: `--set` and its values, for `split`.
    """
    must(fedflame("split", config, "--output-dir", folder / "silos", *overrides))

    def start_trainer(found: Loopback, site: str, kit: Path) -> None:
        client, place = SITES.index(site), folder / site
        data = folder / "silos" / f"client-{client}.jsonl"
        must(fedflame("site", "init", place, "--kit", kit, "--data", data,
                      "--active-experts", str(KS[client]), "--allow-model", "olmoe-tiny"))  # fmt: skip
        found.start_trainer(site, place)

    with federation(folder, SITES, start_trainer) as found:
        wait_until_good([("site", "check", folder / site / "site.toml") for site in SITES])
        yield found


@contextmanager
def federation(
    folder: Path, sites: Sequence[str], start_trainer: Callable[[Loopback, str, Path], None]
) -> Iterator[Loopback]:
    """Provision, start everything, wait until all sites are connected; stop everything at the end.

    Args:
        folder: what the hub and the sites have goes below it.
        sites: their names.
        start_trainer: given a site and its kit, starts what listens at `trainer.sock` of the site's folder.
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


def wait_until_good(checks: Sequence[Sequence[str | Path]]) -> None:
    """Until each of these commands is content."""
    deadline = time.monotonic() + START_SECONDS
    for check in checks:
        while (done := fedflame(*check)).returncode:
            if time.monotonic() > deadline:
                raise SystemExit(f"not all is there after {START_SECONDS:.0f} s:\n{done.stdout}")
            time.sleep(1)


def descendants(pid: int) -> list[int]:
    """Children of a process, their children, and so on; none when it has ended."""
    try:
        return [child.pid for child in psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def alive(pid: int) -> bool:
    """Whether the process is there and has not ended; one that nobody has waited for yet has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _signal(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def free_port() -> str:
    """Of this machine, a moment ago."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def compare(description: str, federate: Federate, default_output: Path) -> None:
    """Set up, run over the sites, run here, compare.

    Args:
        description: for `--help`.
        federate: given an empty folder and an experiment, the federation that stands ready.
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
