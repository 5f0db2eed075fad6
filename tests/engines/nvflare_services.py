"""Runs over a federation of NVIDIA FLARE, and engines of it that are started anew."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import loopback as commands
from loopback import Loopback, Service, fedflame


def start_run(federation: Loopback, experiment: Path, output: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*commands.FEDFLAME, "run", str(experiment), "--engine", "nvflare",
         "--hub", str(federation.hub_file), "--output-dir", str(output)],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def engine_environment() -> dict[str, str]:
    return {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def start_site_3(federation: Loopback) -> Service:
    kit = federation.folder / "hub" / "kits" / "site-3"
    trainer = {"FEDFLAME_TRAINER": str(federation.folder / "site-3" / "trainer.sock")}
    command = ["bash", "startup/sub_start.sh", "--once"]
    return Service("engine", command, kit, engine_environment() | trainer)


def restart_site_3(federation: Loopback) -> None:
    federation.services["site-3 engine"] = start_site_3(federation)
    wait_until_connected(federation)


def wait_until_connected(federation: Loopback) -> None:
    deadline = time.monotonic() + 120
    while fedflame("hub", "check", federation.hub_file).returncode:
        assert time.monotonic() < deadline
        time.sleep(1)


@contextmanager
def hub_that_permits_code(federation: Loopback) -> Iterator[None]:
    """Its administrator has changed the server's rights, until the server ends."""
    path = federation.hub_file.parent / "kits" / "localhost" / "local" / "authorization.json"
    before = path.read_text()
    path.write_text(before.replace('"byoc": "none"', '"byoc": "any"'))
    try:
        restart_server(federation)
        yield
    finally:
        path.write_text(before)


def restart_server(federation: Loopback) -> None:
    federation.services["server"].stop()
    kit, command = (
        federation.hub_file.parent / "kits" / "localhost",
        ["bash", "startup/sub_start.sh", "--once"],
    )
    federation.services["server"] = Service("server", command, kit, engine_environment())
    wait_until_connected(federation)
