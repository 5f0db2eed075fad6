"""Pairwise masks: what one member of a group adds, another subtracts, so that only the group's sum is left.

Bonawitz et al., arXiv 1611.04482, without their shares of secrets: a few durable sites come back instead. The
primitives are those of the package cryptography: X25519 agrees on a secret, HKDF makes a key of it, and AES
in counter mode makes the mask.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

KEY_BYTES = 32
_SALT = b"fedflame mask 1"
_PIECE = 1 << 20
"""Bytes of a mask that exist at a time."""


def masked(
    values: np.ndarray, name: str, own: X25519PrivateKey, peers: Mapping[str, bytes], context: bytes
) -> np.ndarray:
    """Return values, uint32 [n], with a mask for each peer; the sum over all members has none.

    Args:
        values: of this member.
        name: of this member. Of two members, the lower name adds their mask, and the other subtracts it.
        own: the key of this member.
        peers: the public key of each other member, by name.
        context: what the sum is for. Members that were told different things have different masks. It must
            never come again with other values: their difference would have no mask.

    Raises:
        ValueError: a key is no public key of X25519.
    """
    total = values.copy()
    for peer, public in peers.items():
        secret = own.exchange(X25519PublicKey.from_public_bytes(public))
        key = HKDF(SHA256(), KEY_BYTES, _SALT, context).derive(secret)
        _add_mask(total, key, add=name < peer)
    return total


def _add_mask(total: np.ndarray, key: bytes, add: bool) -> None:
    """Add the stream of a key that is used once to uint32 values in place, or subtract it, modulo 2^32."""
    stream = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()
    for start in range(0, len(total), _PIECE // 4):
        part = total[start : start + _PIECE // 4]
        mask = np.frombuffer(stream.update(bytes(part.nbytes)), "<u4")
        if add:
            part += mask
        else:
            part -= mask
