"""Who a site is to the others: an Ed25519 key that they pin, and that signs its key of every run."""

from __future__ import annotations

import hashlib
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedflame.atomic_file import kept_secret

IDENTITY_FILE, RUN_KEY_FILE = "identity.key", "mask.key"
_BYTES = 32
"""Of every private key."""
_PURPOSE = b"fedflame mask key 1 "


def identity(state: Path) -> Ed25519PrivateKey:
    """Return the identity of the site with this state folder, which is made if there is none.

    Raises:
        UserError: its file cannot be read or written, or is damaged.
    """
    return Ed25519PrivateKey.from_private_bytes(kept_secret(state / IDENTITY_FILE, _BYTES))


def run_key(state: Path, run: str) -> X25519PrivateKey:
    """Return the site's key of this run, made if there is none. A stolen one opens no other run.

    Raises:
        UserError: its file cannot be read or written, or is damaged.
    """
    return X25519PrivateKey.from_private_bytes(kept_secret(state / run / RUN_KEY_FILE, _BYTES))


def public(key: Ed25519PrivateKey | X25519PrivateKey) -> str:
    """Return the public half of a key, as 64 hexadecimal digits."""
    return key.public_key().public_bytes_raw().hex()


def fingerprint(key: str) -> str:
    """Return what two people compare of a public key: 16 of the digits of its SHA-256, by fours."""
    digits = hashlib.sha256(bytes.fromhex(key)).hexdigest()[:16]
    return " ".join(digits[at : at + 4] for at in range(0, 16, 4))


def sign(own: Ed25519PrivateKey, run: str, key: str) -> str:
    """Return the signature of the public key of a run, as 128 hexadecimal digits."""
    return own.sign(_signed(run, key)).hex()


def is_signed(key: str, signature: str, run: str, pinned: str) -> bool:
    """Return whether this signs the key for the run, by the identity with the public key `pinned`."""
    try:
        signer = Ed25519PublicKey.from_public_bytes(bytes.fromhex(pinned))
        signer.verify(bytes.fromhex(signature), _signed(run, key))
    except (InvalidSignature, ValueError):
        return False
    return True


def _signed(run: str, key: str) -> bytes:
    return _PURPOSE + f"{run} {key}".encode()
