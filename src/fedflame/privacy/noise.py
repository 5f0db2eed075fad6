"""Random draws that nobody can repeat without a client's secret: who is sampled, and Gaussian noise.

A draw is a stream of AES in counter mode, under a key that follows from the secret and from what the draw
is for. So the same plan has the same draws after a crash, and nothing is spent twice; another plan never
shares a draw, which a difference of two updates would remove. The generators of torch are not secret.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from torch import Tensor

SECRET_BYTES = 32
_PERSON = b"fedflame noise"  # a secret that is used elsewhere, too, gives other keys there
_UNITS = 2.0**-53


def simulated_secret(seed: int, client: int) -> bytes:
    """Return the secret of a client that is only simulated, so that a run can be repeated.

    It protects nobody from whoever knows the seed: this process holds all the rows anyway.
    """
    return hashlib.blake2b(f"{seed} {client}".encode(), digest_size=SECRET_BYTES, person=_PERSON).digest()


@dataclass(frozen=True)
class Noise:
    """The secret draws of one answer to one plan."""

    secret: bytes
    """`SECRET_BYTES` bytes that only the client knows."""
    context: tuple[str, ...]
    """What identifies the answer: everything by which its sums before the noise could differ."""

    def sample(self, count: int, rate: float, step: int) -> list[int]:
        """Return which of `count` rows are in a step: each by itself with this chance (Poisson sampling).

        Never a shuffle: a bound for sampled rows does not hold for shuffled ones (arXiv 2403.17673).
        """
        return np.flatnonzero(self._uniform(count, "sample", step) < rate).tolist()

    def normal(self, shape: Sequence[int], step: int, name: str) -> Tensor:
        """Return independent draws of N(0, 1) in float32, for the value of this name in a step.

        The method is that of Box and Muller, in float64.
        """
        count = int(np.prod(shape, dtype=np.int64))
        pairs = (count + 1) // 2
        uniform = self._uniform(2 * pairs, "normal", step, name)
        radius, angle = np.sqrt(-2 * np.log(uniform[:pairs])), 2 * np.pi * uniform[pairs:]
        draws = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]
        return torch.from_numpy(draws.astype(np.float32)).reshape(tuple(shape))

    def added_to(self, sums: Mapping[str, Tensor], deviation: float, step: int) -> dict[str, Tensor]:
        """Return the sums of a step with noise of this standard deviation on every value.

        Threads share the values, as they do in torch: beside a GPU's step, drawing would take longer.
        """
        with ThreadPoolExecutor(torch.get_num_threads()) as threads:
            drawn = threads.map(lambda name: self.normal(sums[name].shape, step, name), sums)
            return {
                name: value + deviation * normal.to(value.device)
                for (name, value), normal in zip(sums.items(), drawn, strict=True)
            }

    def _uniform(self, count: int, *purpose: int | str) -> np.ndarray:
        """Return draws from the interval (0, 1), without its ends, in float64."""
        context = "\x1f".join(str(part) for part in (*self.context, *purpose))
        key = hashlib.blake2b(context.encode(), key=self.secret, digest_size=32, person=_PERSON).digest()
        stream = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()
        bits = np.frombuffer(stream.update(bytes(8 * count)), np.uint64) >> np.uint64(11)
        return (bits.astype(np.float64) + 0.5) * _UNITS
