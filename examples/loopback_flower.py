"""A hub and three sites on this machine, over Flower with TLS and node keys: one command, one experiment.

    pip install '.[flower]'
    python examples/loopback_flower.py

The program does the same as examples/loopback.py, with a SuperLink and three SuperNodes. The commands are
those of docs/flower.md. At the end the same experiment runs in one process, and both adapters must have the
same bytes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedflame.engines.flower.key import make_key
from loopback import (
    KS,
    SITES,
    START_SECONDS,
    Loopback,
    Service,
    allow_scoring,
    compare,
    fedflame,
    free_port,
    must,
    wait_until_good,
)

BIN = Path(sys.executable).parent
ADDRESS = "127.0.0.1"
QUIET = {
    "PATH": f"{BIN}:{os.environ['PATH']}",
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
}


@contextmanager
def loopback_flower(folder: Path, config: Path, *options: str) -> Iterator[Loopback]:
    """Start the federation of an experiment, with a trainer at each site; yield it when all parts are ready.

    Args:
        folder: an empty folder, for the folders of the hub and the sites.
        config: the experiment, with one client per site.
        options: more options of the SuperLink.
    """
    must(fedflame("split", config, "--output-dir", folder / "silos"))

    def start_trainer(found: Loopback, site: str, place: Path) -> None:
        client = SITES.index(site)
        data = folder / "silos" / f"client-{client}.jsonl"
        must(fedflame("site", "init", place, "--name", site, "--superlink", found.address,
                      "--root-certificates", found.folder / "hub" / "ca.crt", "--data", data,
                      "--active-experts", str(KS[client]), "--allow-model", "olmoe-tiny"))  # fmt: skip
        allow_scoring(place, folder / "silos" / "test" / data.name)
        found.start_trainer(site, place)

    with flower_federation(folder, SITES, start_trainer, *options) as found:
        wait_until_good([("site", "check", folder / site / "site.toml") for site in SITES])
        yield found


@contextmanager
def flower_federation(
    folder: Path, sites: Sequence[str], start_trainer: Callable[[Loopback, str, Path], None], *options: str
) -> Iterator[Loopback]:
    """Make certificates and keys, start all services, and wait for all nodes; stop all services at the end.

    Args:
        folder: the folder for the folders of the hub and the sites.
        sites: the names of the sites.
        start_trainer: called with the federation, a site and its folder; starts a service that listens at
            `trainer.sock` in that folder.
        options: more options of the SuperLink.
    """
    hub, port = folder / "hub", free_port()
    hub.mkdir()
    make_certificates(hub)
    found = Loopback(folder, hub / "hub.toml", "flower", f"{ADDRESS}:{port}")
    try:
        superlink = ["flower-superlink", "--host", ADDRESS, "--port", port, "--enable-supernode-auth",
                     "--ssl-ca-certfile", "ca.crt", "--ssl-certfile", "server.crt",
                     "--ssl-keyfile", "server.key", "--disable-runtime-dependency-installation",
                     *options]  # fmt: skip
        found.services["superlink"] = flower_service("superlink", superlink, hub)
        connection = f'address = "{found.address}"\nroot-certificates = "{hub}/ca.crt"\n'
        (hub / "config.toml").write_text(f"[superlink.hub]\n{connection}")
        nodes = ""
        for site in sites:
            place = folder / site
            place.mkdir()
            start_trainer(found, site, place)
            nodes += f'{site} = "{register(hub, make_key(place / "node"))}"\n'
            start_node(found, site, place / "node")
        found.hub_file.write_text(
            f'sites = "{",".join(sites)}"\n[flower]\naddress = "{found.address}"\n'
            f'root_certificates = "ca.crt"\n[flower.nodes]\n{nodes}'
        )
        wait_until_good([("hub", "check", found.hub_file)])
        yield found
    finally:
        found.stop()


def make_certificates(folder: Path) -> None:
    """Make a certificate authority, and the SuperLink's certificate signed by it."""
    curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-384", "-nodes"]
    _done(["openssl", "req", "-x509", *curve, "-days", "3650", "-subj", "/CN=fedflame hub",
           "-keyout", "ca.key", "-out", "ca.crt"], folder)  # fmt: skip
    _done(["openssl", "req", "-x509", *curve, "-days", "365", "-subj", f"/CN={ADDRESS}",
           "-addext", f"subjectAltName=IP:{ADDRESS}", "-addext", "basicConstraints=critical,CA:FALSE",
           "-CA", "ca.crt", "-CAkey", "ca.key",
           "-keyout", "server.key", "-out", "server.crt"], folder)  # fmt: skip


def register(hub: Path, public_key: Path) -> str:
    """Register a node at the SuperLink and return its id."""
    asked = ["supernode", "register", str(public_key), "hub", "--format", "json"]
    deadline = time.monotonic() + START_SECONDS
    while True:
        done = flwr(hub, *asked)
        answer: dict[str, Any] = json.loads(done.stdout or "{}")
        if answer.get("success"):
            return str(answer["node-id"])
        if time.monotonic() > deadline:
            raise SystemExit(f"{public_key} is not registered: {done.stdout}{done.stderr}")
        time.sleep(1)


def flwr(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Flower's command with the connection in this folder's config.toml."""
    environment = os.environ | QUIET | {"FLWR_HOME": str(home)}
    return subprocess.run(
        [str(BIN / "flwr"), *arguments], env=environment, capture_output=True, text=True, check=False
    )


def start_node(found: Loopback, site: str, key: Path) -> None:
    """Start the SuperNode of a site with this key."""
    place = found.folder / site
    authority = str(found.folder / "hub" / "ca.crt")
    node = ["flower-supernode", "--superlink", found.address, "--root-certificates", authority,
            "--auth-supernode-private-key", str(key), "--host", ADDRESS, "--port", free_port()]  # fmt: skip
    trainer = {"FEDFLAME_TRAINER": str(place / "trainer.sock")}
    found.services[f"{site} engine"] = flower_service("node", node, place, trainer)


def flower_service(
    name: str, command: Sequence[str], folder: Path, environment: dict[str, str] | None = None
) -> Service:
    """Start one of Flower's commands, with a Flower folder of its own."""
    program = str(BIN / command[0])
    home = {"FLWR_HOME": str(folder / "flwr")}
    return Service(name, [program, *command[1:]], folder, QUIET | home | (environment or {}))


def _done(command: Sequence[str], folder: Path) -> None:
    subprocess.run(command, cwd=folder, check=True, capture_output=True)


if __name__ == "__main__":
    compare((__doc__ or "").splitlines()[0], loopback_flower, Path("runs/loopback-flower"))
