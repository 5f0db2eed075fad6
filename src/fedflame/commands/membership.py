"""`fedflame hub renew` and `hub revoke`: the members of a federation after its first day."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console

from fedflame.commands.check import RENEW_DAYS, Finding, check_port, read_admin
from fedflame.commands.progress import say_line
from fedflame.engines.flower.engine import FlowerEngine
from fedflame.engines.hub import Hub
from fedflame.engines.nvflare.certificate import now
from fedflame.engines.nvflare.engine import NvflareEngine, nvflare_command
from fedflame.engines.nvflare.membership import (
    Member,
    Membership,
    read_membership,
    renew,
    revoke_offline,
)
from fedflame.engines.nvflare.provision import authority_path
from fedflame.engines.nvflare.revoked import revoked_names
from fedflame.errors import UserError

SOON_DAYS = 90
"""What ends within so many days is renewed if no name is given."""


def renew_members(hub: Hub, names: Sequence[str], console: Console) -> None:
    """Renew the certificates of these members, or of all whose certificates end soon, and say what to do.

    Raises:
        UserError: see `renew`; the hub is one over Flower; or the authority itself ends soon.
    """
    if hub.flower.address:
        raise UserError(
            "over Flower, the keys of sites have no end, and the SuperLink's certificate is yours: sign "
            "another with the same ca.key (docs/flower.md)"
        )
    membership = read_membership(hub.folder)
    if membership.authority.days_left(now()) < SOON_DAYS:
        raise UserError(
            f"the authority itself {membership.authority.end_in_words(now())}, and no certificate outlasts "
            "it; make a hub with a new one (docs/hub-administrator.md)"
        )
    wanted = list(dict.fromkeys(names)) or [member.name for member in _ending(membership, SOON_DAYS)]
    if not wanted:
        say_line(console, f"no certificate ends within {SOON_DAYS} days; name those to renew all the same")
        return
    kits = renew(nvflare_command(), membership, wanted)
    say_line(console, _renewed(membership, kits))


def revoke_site(hub: Hub, site: str, console: Console) -> None:
    """Shut a site out, and say what is left to do.

    Raises:
        UserError: there is no such site, or the engine cannot shut it out.
    """
    try:
        if hub.flower.address:
            FlowerEngine(hub).revoke(site)
        else:
            _revoke(hub, site)
    except OSError as error:
        raise UserError(f"{site} is not revoked: {error}") from error
    told = f"{site} is revoked: it is admitted no longer, also not to runs under way; the others stay.\n"
    if hub.flower.address:
        told += f"Take {site} out of `sites` and `flower.nodes` of the hub's file."
    else:
        told += f"Take {site} out of `sites` of the hub's file; this name is not admitted again, another is."
    say_line(console, told)


def check_members(membership: Membership, sites: Sequence[str]) -> Iterator[Finding]:
    """Whether the certificates that the hub's authority has signed last, and no site of runs was revoked."""
    authority, moment = membership.authority, now()
    yield Finding(
        authority.days_left(moment) > RENEW_DAYS,
        f"the authority {authority.end_in_words(moment)}",
        "make a hub with a new one: docs/hub-administrator.md",
    )
    for member in _ending(membership, RENEW_DAYS):
        what = f"certificate of {member.name} {member.certificate.end_in_words(moment)}"
        yield Finding(False, what, f"fedflame hub renew HUB {member.name}")
    for site in sorted(revoked_names(membership.server_kit).intersection(sites)):
        yield Finding(
            False, f"{site} was revoked", "take it out of `sites`, or put another name in its place"
        )


def _ending(membership: Membership, days: float) -> list[Member]:
    """The members, but for those who were revoked, whose certificates end within so many days."""
    revoked, moment = revoked_names(membership.server_kit), now()
    return [
        member
        for member in membership.members
        if member.name not in revoked and member.certificate.days_left(moment) <= days
    ]


def _revoke(hub: Hub, site: str) -> None:
    """By the server, or in its kit while it is down. Raises OSError or UserError."""
    known = hub.site_names()
    if authority_path(hub.folder).exists():
        known = read_membership(hub.folder).names("site")
    if site not in known:
        raise UserError(f"{site} is no site of this hub; {', '.join(known)} are")
    admin = read_admin(hub.folder / hub.nvflare.admin_kit)
    if check_port(admin["host"], int(admin["port"])).good:
        NvflareEngine(hub).revoke(site)
    else:
        revoke_offline(hub.folder / "kits" / admin["host"], site)


def _renewed(membership: Membership, kits: Sequence[Path]) -> str:
    lines = ["New keys and certificates, by the same authority:", *(f"   {kit}/startup" for kit in kits)]
    names = [kit.name for kit in kits]
    if sites := [name for name in names if name in membership.names("site")]:
        lines.append(
            f"Send {', '.join(sites)} the new `startup` folder, on a way that nobody else can read. Each "
            "puts it in the place of its own and starts its engine again; the old one is good until then."
        )
    if membership.server_kit.name in names:
        lines.append("Start the server again, when no run is under way.")
    lines.append(
        "A certificate that was replaced is good until it ends; a key that was lost needs `hub revoke`."
    )
    return "\n".join(lines)
