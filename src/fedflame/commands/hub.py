"""`fedflame hub`: what a hub needs to invite sites, and whether it has it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Set
from importlib.metadata import version
from pathlib import Path

from rich.console import Console

from fedflame.atomic_file import write_missing
from fedflame.base.files import model_digest
from fedflame.commands.check import (
    Finding,
    after_each_other,
    check_certificate,
    check_clock,
    check_disk,
    check_port,
    print_findings,
    read_admin,
)
from fedflame.commands.membership import check_members
from fedflame.commands.peers import keys_of_hub
from fedflame.commands.service_units import service_unit
from fedflame.engines.flower.engine import FlowerEngine
from fedflame.engines.hub import Hub, load_hub
from fedflame.engines.nvflare.engine import NvflareEngine, nvflare_command
from fedflame.engines.nvflare.membership import read_membership
from fedflame.engines.nvflare.provision import Federation, authority_path, provision


def init_hub(folder: Path, federation: Federation, console: Console) -> None:
    """Make kits, the hub's file and its systemd unit; what is there already stays.

    Raises:
        UserError: nvflare is not installed or refuses the names, or the folder cannot be written.
    """
    folder = folder.absolute()
    provision(nvflare_command(), folder, federation)
    server = folder / "kits" / federation.host
    unit = service_unit(
        "server of a fedflame federation", f"{server}/startup/sub_start.sh --once", server, {}
    )
    files = {
        folder / "hub.toml": _hub_file(federation),
        folder / "fedflame-server.service": unit,
    }
    write_missing(files)
    told = _next_steps(folder, federation) + _lacking(folder / "hub.toml", federation)
    console.print(told, markup=False, highlight=False, soft_wrap=True)


def check_hub(hub: Hub, model: str | None, console: Console) -> bool:
    """Look at everything that a run over this hub needs; whether all is well."""
    package, server = ("flwr", _superlink(hub)) if hub.flower.address else ("nvflare", _server(hub))
    findings = after_each_other(_machine(hub, package), keys_of_hub(hub), server, _model(model))
    return print_findings(findings, console)


def _machine(hub: Hub, package: str) -> Iterator[Finding]:
    yield Finding(True, f"{package} {version(package)} with Python {sys.version.split()[0]}")
    yield check_clock()
    yield check_disk(hub.folder)


def _server(hub: Hub) -> Iterator[Finding]:
    kit = hub.folder / hub.nvflare.admin_kit
    admin = read_admin(kit)
    yield check_certificate(kit, admin["username"])
    if authority_path(hub.folder).exists():
        yield from check_members(read_membership(hub.folder), hub.site_names())
    port = check_port(admin["host"], int(admin["port"]))
    yield port
    if not port.good:
        return
    connected = NvflareEngine(hub).connected()
    if connected is None:
        yield Finding(False, "the server does not answer", f"look into log.txt of its kit, not {kit}'s")
        return
    yield Finding(True, "the server answers, and takes this administrator")
    yield from _sites(hub, connected)


def _superlink(hub: Hub) -> Iterator[Finding]:
    engine = FlowerEngine(hub)
    try:
        nodes = engine.online()
    except OSError as error:
        yield Finding(False, str(error), "look into the SuperLink's log")
        return
    if hub.flower.nodes:
        yield Finding(True, "the SuperLink answers; sites are known by their nodes' keys")
        yield from _sites(hub, engine.connected() or set())
        return
    wanted = len(hub.site_names())
    what = f"the SuperLink answers; {len(nodes)} nodes for {wanted} sites, which say themselves who they are"
    yield Finding(len(nodes) >= wanted, what, "start the other SuperNodes")


def _sites(hub: Hub, connected: Set[str]) -> Iterator[Finding]:
    for site in hub.site_names():
        there = site in connected
        what = f"site {site} is {'' if there else 'not '}connected"
        yield Finding(there, what, "its owner's `fedflame site check` says more")


def _model(name: str | None) -> Iterator[Finding]:
    if name is not None:
        yield Finding(True, f"model {name} has digest {model_digest(name)}; every site must have the same")


def _hub_file(federation: Federation) -> str:
    return (
        "# The hub of a federation: `fedflame run CONFIG --engine nvflare --hub hub.toml`\n"
        f"sites = {json.dumps(list(federation.sites))} # the first is client 0 of a run\n\n"
        f'[nvflare]\nadmin_kit = "kits/{federation.admins[0]}"\n\n'
        "[rounds]\n"
        "# round_timeout = 3600.0   # seconds; a site without an answer by then is left out of the round\n"
        '# straggler_grace = "learned" # or seconds after server.min_clients answers; 0: as round_timeout\n'
        "# rejoin_timeout = 120.0   # seconds that a site that is gone has to come back\n"
    )


def _next_steps(folder: Path, federation: Federation) -> str:
    sites = "\n".join(f"   {folder}/kits/{site}" for site in federation.sites)
    return f"""\
Made in {folder}: kits with keys and certificates, hub.toml, fedflame-server.service.
1. Send each site its kit, on a way that nobody else can read: it has a private key.
{sites}
   Keep {folder}/provision: whoever has it can admit members.
2. Let TCP port {federation.port} of {federation.host} in, from the sites; nothing else.
3. Start the server: {folder}/kits/{federation.host}/startup/sub_start.sh --once, or by the systemd unit.
4. fedflame hub check {folder}/hub.toml"""


def _lacking(hub_file: Path, federation: Federation) -> str:
    """What a hub's file that was there needs for sites that are new."""
    known = load_hub(hub_file).site_names()
    lacking = [site for site in federation.sites if site not in known]
    return f"\n{hub_file} stays as it was; add {', '.join(lacking)} to its `sites`" if lacking else ""
