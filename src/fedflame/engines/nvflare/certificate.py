"""What a kit's certificate says: for whom, and for how long."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.x509.oid import NameOID

from fedflame.errors import UserError


@dataclass(frozen=True)
class Certificate:
    """One of a kit, checked against the kit's authority."""

    name: str
    """Of its owner."""
    begins: datetime
    ends: datetime
    """Or its authority does, whichever is first."""

    def days_left(self, now: datetime) -> float:
        """Until it ends; below zero afterwards."""
        return (self.ends - now).total_seconds() / 86400


def read_certificate(kit: Path) -> Certificate:
    """The certificate in `kit/startup`.

    Raises:
        UserError: there is none, it cannot be read, or the kit's authority has not signed it.
    """
    startup = kit / "startup"
    path = next((startup / name for name in ("client.crt", "server.crt") if (startup / name).is_file()), None)
    if path is None:
        raise UserError(f"{kit}: no kit of nvflare (no certificate in {startup})")
    try:
        found = x509.load_pem_x509_certificate(path.read_bytes())
        authority = x509.load_pem_x509_certificate((startup / "rootCA.pem").read_bytes())
        found.verify_directly_issued_by(authority)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    except InvalidSignature as error:
        raise UserError(f"{path}: not signed by the authority in {startup / 'rootCA.pem'}") from error
    names = found.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return Certificate(
        str(names[0].value) if names else "",
        found.not_valid_before_utc,
        min(found.not_valid_after_utc, authority.not_valid_after_utc),
    )


def now() -> datetime:
    """In the zone that certificates are written in."""
    return datetime.now(UTC)
