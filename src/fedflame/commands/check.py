"""What `hub check` and `site check` have in common: findings, each with what to do about it."""

from __future__ import annotations

import shutil
import socket
import ssl
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography import x509
from rich.console import Console

from fedflame.engines.address import host_and_port
from fedflame.engines.nvflare.certificate import certificate_of, now, read_certificate
from fedflame.errors import UserError
from fedflame.reading import read_object

RENEW_DAYS = 30
FREE_BYTES = 2 << 30
CONNECT_SECONDS = 5.0


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    good: bool
    what: str
    advice: str = ""


def print_findings(findings: Iterable[Finding], console: Console) -> bool:
    """Print each as it comes; whether all are good."""
    good = True
    for finding in findings:
        good = good and finding.good
        mark = "ok " if finding.good else "BAD"
        advice = f"; {finding.advice}" if finding.advice and not finding.good else ""
        console.print(f"{mark}  {finding.what}{advice}", markup=False, highlight=False, soft_wrap=True)
    return good


def check_certificate(kit: Path, name: str) -> Finding:
    """The kit's certificate is for this name, signed, begun and not about to end."""
    try:
        certificate = read_certificate(kit)
    except UserError as error:
        return Finding(False, str(error), "ask the hub's administrator for the kit")
    moment = now()
    if certificate.name != name:
        return Finding(
            False, f"certificate is for {certificate.name}, not {name}", "use the kit of this name"
        )
    if moment < certificate.begins:
        return Finding(False, f"certificate begins at {certificate.begins}", "set this machine's clock")
    advice = "the hub's administrator renews it: fedflame hub renew"
    good = certificate.days_left(moment) > RENEW_DAYS
    return Finding(good, f"certificate of {name} {certificate.end_in_words(moment)}", advice)


def check_clock() -> Finding:
    """The machine keeps its clock by the network, as far as it can say."""
    try:
        asked = ["timedatectl", "show", "-p", "NTPSynchronized", "--value"]
        answer = subprocess.run(asked, capture_output=True, text=True, timeout=5, check=False).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        answer = ""
    if answer not in ("yes", "no"):
        return Finding(
            True, f"clock says {now():%Y-%m-%d %H:%M:%S} UTC; this machine cannot say if it is set"
        )
    return Finding(answer == "yes", "clock is set by the network", "switch time synchronisation on (NTP)")


def check_disk(folder: Path) -> Finding:
    """There is room for updates and checkpoints."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    return Finding(free > FREE_BYTES, f"{free / 2**30:.1f} GiB free at {there}", "make room: 2 GiB and more")


def check_port(host: str, port: int) -> Finding:
    """Something listens there."""
    try:
        socket.create_connection((host, port), CONNECT_SECONDS).close()
    except OSError as error:
        advice = "is the hub's server up, and does every firewall on the way let TCP to this port out and in?"
        return Finding(False, f"port {host}:{port}: {error}", advice)
    return Finding(True, f"port {host}:{port} is open")


def check_handshake(
    host: str, port: int, identity: str, authority: Path, own: tuple[Path, Path] | None = None
) -> Finding:
    """The hub's server shows a certificate of this authority, under its own name, that is not about to end.

    Args:
        host: where it listens.
        port: where it listens.
        identity: its name.
        authority: PEM file of who signs.
        own: certificate and key to show to the server, where it asks for one.
    """
    try:
        context = ssl.create_default_context(cafile=str(authority))
        if own is not None:
            context.load_cert_chain(*own)
        with (
            socket.create_connection((host, port), CONNECT_SECONDS) as plain,
            context.wrap_socket(plain, server_hostname=identity) as tls,
        ):
            shown = x509.load_der_x509_certificate(tls.getpeercert(binary_form=True) or b"")
    except (OSError, ssl.SSLError, ValueError) as error:
        return Finding(
            False, f"TLS with {host}:{port}: {error}", "another federation's certificate, or another server"
        )
    certificate, moment = certificate_of(shown, shown), now()
    what = f"TLS: {host}:{port} is {identity}, signed by {authority.name}; its certificate "
    good = certificate.days_left(moment) > RENEW_DAYS
    return Finding(good, what + certificate.end_in_words(moment), "the hub's administrator renews it")


def client_target(kit: Path) -> tuple[str, int, str]:
    """Host, port and name of the server, as a site's kit has them. Raises UserError."""
    try:
        server = read_object(kit / "startup" / "fed_client.json")["servers"][0]
        host, port = host_and_port(str(server["service"]["target"]), "target")
        return host, port, str(server["identity"])
    except (KeyError, IndexError, TypeError, UserError) as error:
        raise UserError(f"{kit}: no kit of a site (startup/fed_client.json: {error})") from error


def read_admin(kit: Path) -> dict[str, Any]:
    """What an administrator's kit says. Raises UserError."""
    try:
        admin: dict[str, Any] = read_object(kit / "startup" / "fed_admin.json")["admin"]
        return admin
    except (KeyError, UserError) as error:
        raise UserError(f"{kit}: no kit of an administrator (startup/fed_admin.json: {error})") from error


def after_each_other(*groups: Iterator[Finding]) -> Iterator[Finding]:
    """All of them; a group that cannot go on ends in a finding of its own."""
    for group in groups:
        try:
            yield from group
        except UserError as error:
            yield Finding(False, str(error))
