"""Read the certificate of a startup kit: its owner and its validity."""

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
    """The certificate of a kit, verified against the kit's certificate authority."""

    name: str
    """The name of its owner."""
    begins: datetime
    ends: datetime
    """When it or its authority's certificate expires, whichever is first."""

    def days_left(self, now: datetime) -> float:
        """Return the days until it expires; negative afterwards."""
        return (self.ends - now).total_seconds() / 86400

    def end_in_words(self, now: datetime) -> str:
        """Say when it expires."""
        days = self.days_left(now)
        if days < 0:
            return f"ended on {self.ends:%Y-%m-%d}"
        return f"ends in {days:.0f} days, on {self.ends:%Y-%m-%d}"


def read_certificate(kit: Path) -> Certificate:
    """Read the certificate in `kit/startup`.

    Raises:
        UserError: there is no certificate, it cannot be read, or the kit's authority has not signed it.
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
    return certificate_of(found, authority)


def certificate_of(found: x509.Certificate, authority: x509.Certificate) -> Certificate:
    """Return what a certificate says, that is good as long as its authority's is."""
    names = found.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return Certificate(
        str(names[0].value) if names else "",
        found.not_valid_before_utc,
        min(found.not_valid_after_utc, authority.not_valid_after_utc),
    )


def now() -> datetime:
    """Return the current time in UTC, the time zone of certificates."""
    return datetime.now(UTC)
