"""The members of a federation over time: whose certificate ends when, new ones, who may not join again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cryptography import x509
from cryptography.x509.oid import NameOID

from fedflame.atomic_file import write_atomically
from fedflame.engines.nvflare.certificate import Certificate, certificate_of
from fedflame.engines.nvflare.provision import (
    Federation,
    add_kit,
    authority_path,
    make_kits,
    refuse_revoked,
)
from fedflame.engines.nvflare.revoked import revoked_names, revoked_path, revoked_text
from fedflame.errors import UserError
from fedflame.reading import read_object

_AUTHORITY = "root_cert"


@dataclass(frozen=True)
class Member:
    """One that the authority has signed a certificate for."""

    name: str
    role: Literal["hub", "site", "administrator"]
    certificate: Certificate


@dataclass(frozen=True)
class Membership:
    """What the authority of a hub's folder knows."""

    folder: Path
    port: int
    authority: Certificate
    members: Sequence[Member]

    @property
    def server_kit(self) -> Path:
        """The folder of the server's kit."""
        return self.folder / "kits" / self.names("hub")[0]

    def names(self, role: str) -> list[str]:
        """Return the names of all with this role."""
        return [member.name for member in self.members if member.role == role]


def read_membership(folder: Path) -> Membership:
    """Read what the authority in a hub's folder knows.

    Raises:
        UserError: there is no authority, or its files are damaged.
    """
    path = authority_path(folder)
    if not path.exists():
        raise UserError(f"{path}: no authority there; call this where `fedflame hub init` made the kits")
    state = read_object(path)
    try:
        project = json.loads((folder / "provision" / "project.yml").read_bytes())
        host, port = project["participants"][0]["name"], int(project["participants"][0]["fed_learn_port"])
        authority = x509.load_pem_x509_certificate(state[_AUTHORITY].encode())
        members = [
            _member(name, entry, host, authority) for name, entry in state.items() if isinstance(entry, dict)
        ]
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not what nvflare keeps there: {error!r}; put back a copy of it") from error
    return Membership(folder, port, certificate_of(authority, authority), members)


def renew(command: str, membership: Membership, names: Sequence[str]) -> list[Path]:
    """Sign new certificates for these members with the authority that is there; all others keep theirs.

    Each gets a new key, too. A member's kit that is in `kits` gets the new `startup` folder, one that is not
    there any longer is made anew.

    Args:
        command: path of the `nvflare` command.
        membership: what the authority knows.
        names: the members.

    Returns:
        The kits.

    Raises:
        UserError: a name is unknown or was revoked, nvflare refuses, or the folder cannot be written.
    """
    known = [member.name for member in membership.members]
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"{unknown[0]} has no certificate of this hub; {', '.join(known)} have")
    refuse_revoked(membership.server_kit, names)
    path = authority_path(membership.folder)
    before = path.read_bytes()
    state = {name: entry for name, entry in json.loads(before).items() if name not in names}
    write_atomically(path, json.dumps(state).encode())
    try:
        made = make_kits(command, membership.folder, _federation(membership))
    except BaseException:
        write_atomically(path, before)
        raise
    kits = [membership.folder / "kits" / name for name in names]
    try:
        for kit in kits:
            _put(made / kit.name, kit)
    except OSError as error:
        raise UserError(f"{membership.folder}: {error}; the new kits are in {made}") from error
    return kits


def revoke_offline(server_kit: Path, site: str) -> None:
    """Put a site on the list that the server reads when it starts.

    Raises:
        UserError: there is no kit of a server, or the list cannot be read or written.
    """
    if not (server_kit / "startup" / "fed_server.json").is_file():
        raise UserError(f"{server_kit}: no kit of a server; call this on the hub's machine, in its folder")
    names = revoked_names(server_kit) | {site}
    write_atomically(revoked_path(server_kit), revoked_text(names).encode())


def _member(name: str, entry: Mapping[str, Any], host: str, authority: x509.Certificate) -> Member:
    found = x509.load_pem_x509_certificate(entry["cert"].encode())
    with_role = bool(found.subject.get_attributes_for_oid(NameOID.UNSTRUCTURED_NAME))
    role: Literal["hub", "site", "administrator"] = (
        "hub" if name == host else "administrator" if with_role else "site"
    )
    return Member(name, role, certificate_of(found, authority))


def _federation(membership: Membership) -> Federation:
    sites, admins = membership.names("site"), membership.names("administrator")
    return Federation(membership.names("hub")[0], membership.port, sites, admins)


def _put(made: Path, kit: Path) -> None:
    """Give a kit its new `startup` folder; make the kit if it is not there. Raises OSError."""
    if not kit.exists():
        add_kit(made, kit)
        return
    fresh, old = kit / "startup.new", kit / "startup.old"
    for left in (fresh, old):
        shutil.rmtree(left, ignore_errors=True)
    shutil.copytree(made / "startup", fresh)
    (kit / "startup").rename(old)
    fresh.rename(kit / "startup")
    shutil.rmtree(old, ignore_errors=True)
