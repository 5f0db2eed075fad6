"""Create the key that identifies a site's node to the SuperLink."""

from __future__ import annotations

import os
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from fedflame.errors import UserError


def make_key(path: Path) -> Path:
    """Create a private key that only its owner can read, and the public key `NAME.pub`; keep existing keys.

    Returns:
        The path of the public key, for the hub.

    Raises:
        UserError: the folder cannot be written.
    """
    public = path.with_name(f"{path.name}.pub")
    if path.exists():
        return public
    key = ec.generate_private_key(ec.SECP384R1())  # the curve of Flower's documentation
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        public.write_bytes(key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH))
        private = key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(private)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from error
    return public
