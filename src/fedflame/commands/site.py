"""`fedflame site`: from the kit that the hub sent to a site that takes part, and whether it can."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from fedflame.atomic_file import write_missing
from fedflame.base.device import choose_device, device_in_words
from fedflame.base.files import model_digest
from fedflame.commands.check import (
    Finding,
    after_each_other,
    check_certificate,
    check_clock,
    check_disk,
    check_handshake,
    check_port,
    client_target,
    print_findings,
)
from fedflame.commands.peers import keys_of_site
from fedflame.commands.service_units import service_unit
from fedflame.commands.site_privacy import delta_finding, privacy_finding
from fedflame.engines.address import host_and_port
from fedflame.engines.command import installed_command
from fedflame.engines.flower.key import make_key
from fedflame.engines.nvflare.certificate import read_certificate
from fedflame.errors import InvalidMessage, UserError
from fedflame.trainer.ask import SOCKET_VARIABLE, ask
from fedflame.trainer.rows import load_site_rows, units_of
from fedflame.trainer.site import SITE_NAME, Site, load_site
from fedflame.wire.envelope import Envelope

_NO_RUN = "0" * 32


@dataclass(frozen=True)
class NewSite:
    """What a site's owner says of it."""

    data: str
    active_experts: int
    models: Mapping[str, str]


@dataclass(frozen=True)
class SiteEngine:
    """The process of a site that takes part over one engine."""

    site: str
    """The site's name there."""
    section: str
    """Of the site's file."""
    command: str
    folder: Path
    """Where the command runs."""
    address: str
    """Host and port that must be let out."""
    restart_seconds: int = 5
    private_key: Path | None = None
    """Where the site's own key is, or is to be made; NVIDIA FLARE's is in the kit."""


def nvflare_engine(kit: Path) -> SiteEngine:
    """By the kit that the hub sent. Raises UserError where it is none."""
    kit = kit.absolute()
    host, port, _ = client_target(kit)
    section = f"[nvflare]\nkit = {json.dumps(str(kit))}\n"
    command = f"{kit}/startup/sub_start.sh --once"
    return SiteEngine(read_certificate(kit).name, section, command, kit, f"{host}:{port}")


def flower_engine(site: str, folder: Path, superlink: str, root_certificates: Path) -> SiteEngine:
    """By a key of the site's own.

    Raises:
        UserError: name, address or file of certificates is none, or `flower-supernode` is not installed.
    """
    folder, authority = folder.absolute(), root_certificates.absolute()
    host_and_port(superlink, "--superlink")
    if not re.fullmatch(SITE_NAME, site):
        raise UserError(f"--name {site!r}: must be of letters, digits, '.', '_' and '-'")
    if not authority.is_file():
        raise UserError(f"--root-certificates {root_certificates}: no such file")
    node = installed_command("flower-supernode", "flower")
    key = folder / "node"
    known = {"superlink": superlink, "root_certificates": str(authority)}
    section = "[flower]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in known.items())
    command = (
        f"{node} --superlink {superlink} --root-certificates {authority} --auth-supernode-private-key {key}"
    )
    # A SuperLink refuses a key whose node it has not missed yet, which takes it 60 seconds.
    return SiteEngine(site, section, command, folder, superlink, 65, key)


def init_site(folder: Path, new: NewSite, engine: SiteEngine, console: Console) -> None:
    """Write the site's file, its systemd units and its key; what is there already stays.

    Raises:
        UserError: the folder cannot be written, or the file that is there is broken.
    """
    folder = folder.absolute()
    site_file = folder / "site.toml"
    trainer = f"{sys.executable} -m fedflame trainer --site {site_file}"
    socket = {SOCKET_VARIABLE: str(folder / "trainer.sock")}
    files = {
        site_file: _site_file(new, engine),
        folder / "fedflame-trainer.service": service_unit(
            f"fedflame trainer of {engine.site}", trainer, folder, {}
        ),
        folder / "fedflame-engine.service": service_unit(
            f"engine of {engine.site}", engine.command, engine.folder, socket, engine.restart_seconds
        ),
    }
    write_missing(files)
    load_site(site_file)
    public_key = make_key(engine.private_key) if engine.private_key else None
    steps = _next_steps(folder, engine, socket, public_key)
    console.print(steps, markup=False, highlight=False, soft_wrap=True)


def check_site(site: Site, console: Console) -> bool:
    """Look at everything that taking part needs; whether all is well."""
    return print_findings(
        after_each_other(
            _machine(site),
            _device(site),
            _own(site),
            privacy_finding(site),
            keys_of_site(site),
            _trainer(site),
            _hub(site),
        ),
        console,
    )


def _machine(site: Site) -> Iterator[Finding]:
    yield check_clock()
    yield check_disk(site.state_path)


def _device(site: Site) -> Iterator[Finding]:
    yield Finding(True, f"device {device_in_words(choose_device(site.trainer.device, 'trainer.device'))}")


def _own(site: Site) -> Iterator[Finding]:
    loaded = load_site_rows(site)
    scored = f" and {len(loaded.tests)} to score" if loaded.tests else ""
    read = f"{len(loaded.training)} rows{scored}, {len(loaded.skipped)} skipped; {loaded.columns}"
    yield Finding(True, f"{site.dataset}: {read}")
    yield from delta_finding(site, len(units_of(loaded.training)))
    for name, place in site.models.items():
        yield Finding(True, f"model {name} has digest {model_digest(place)}; the hub must have the same")


def _trainer(site: Site) -> Iterator[Finding]:
    request = Envelope({"kind": "describe", "ticket": "", "run": _NO_RUN, "site": site.name})
    try:
        answer = ask(site.socket_path, request, patience=0, timeout=30)
    except (OSError, InvalidMessage) as error:
        yield Finding(False, str(error), "start it: fedflame trainer --site, or its systemd unit")
        return
    yield _described(site, answer)


def _described(site: Site, answer: Envelope) -> Finding:
    again = "it serves the file that was there when it started: start it again"
    if answer.header.get("kind") != "description":
        return Finding(False, f"the trainer says: {answer.header.get('reason')}", again)
    found = answer.header.get("active_experts"), answer.header.get("max_active_experts")
    wanted = site.trainer.active_experts, site.most_experts
    says = "" if found == wanted else f"; the file says {_allowed(*wanted)}"
    return Finding(found == wanted, f"trainer of {site.name} answers, {_allowed(*found)}{says}", again)


def _allowed(k: Any, most: Any) -> str:
    return f"k = {k}" if most == k else f"k = {k}, at most {most} in turn"


def _hub(site: Site) -> Iterator[Finding]:
    if site.nvflare.kit:
        kit = site.folder / site.nvflare.kit
        yield check_certificate(kit, site.name)
        host, port, identity = client_target(kit)
        startup = kit / "startup"
        own = startup / "client.crt", startup / "client.key"
        yield from _server(host, port, identity, startup / "rootCA.pem", own)
    if site.flower.superlink:
        host, port = host_and_port(site.flower.superlink, "flower.superlink")
        yield from _server(host, port, host, site.folder / site.flower.root_certificates, None)


def _server(
    host: str, port: int, identity: str, authority: Path, own: tuple[Path, Path] | None
) -> Iterator[Finding]:
    open_port = check_port(host, port)
    yield open_port
    if open_port.good:
        yield check_handshake(host, port, identity, authority, own)


def _site_file(new: NewSite, engine: SiteEngine) -> str:
    models = "".join(f"{json.dumps(known)} = {json.dumps(place)}\n" for known, place in new.models.items())
    return f"""\
# This site: what it has, affords and allows. The file stays here; the hub learns the rows' number and k.
name = "{engine.site}"

[data]
dataset_name = {json.dumps(str(Path(new.data).absolute()) if Path(new.data).exists() else new.data)}
# test_size = 0.1 # the share that the hub may have scored here instead of trained on; only sums leave

[trainer]
active_experts = {new.active_experts} # k: experts per token that this machine affords

[limits] # a plan that asks for more is refused
# max_rounds = 1000
# max_steps = 10000
# max_tokens = 50000000
# max_flops = 0.0
# max_rank = 256
# max_memory = 0.0 # GB; 0: all that this machine has
# These are off until you set them; the page for site administrators says what each prevents.
# max_seconds_per_round = 1200.0
# max_rounds_per_day = 50
# max_runs = 20
# min_rows_per_update = 64
# min_tokens_per_update = 5000
# max_update_norm = 5.0
# disclosure = "rounded" # of loss and activation counts: exact, rounded or withheld

[privacy] # of single rows; needs fedflame[privacy]
# require = true # only runs with privacy.unit = "row"
# max_epsilon = 8.0 # of all private runs together; the others are refused

[models] # the base models that may be trained: the hub's name, and the folder or hub id here
{models}
{engine.section}"""


def _next_steps(folder: Path, engine: SiteEngine, socket: Mapping[str, str], public_key: Path | None) -> str:
    variables = " ".join(f"{name}={value}" for name, value in socket.items())
    send = f"\n   Send {public_key} to the hub's administrator, who registers it." if public_key else ""
    return f"""\
Made in {folder}: site.toml, fedflame-trainer.service, fedflame-engine.service.
1. Read site.toml: it says what may be done here, and nobody else can change it.{send}
2. Let TCP to {engine.address} out. Nothing needs to come in.
3. Start both, by the systemd units or by hand:
   fedflame trainer --site {folder}/site.toml
   {variables} {engine.command}
4. fedflame site check {folder}/site.toml"""


def parse_models(pairs: list[str]) -> dict[str, str]:
    """`NAME=PLACE` or `NAME`, which is its own place. Raises UserError for an empty one."""
    models = {}
    for pair in pairs:
        name, _, place = pair.partition("=")
        if not name:
            raise UserError(f"--allow-model {pair!r}: must be NAME or NAME=FOLDER")
        models[name] = place or name
    return models
