"""Fixed-point numbers modulo 2^32, in which masks cancel exactly: a sum of floats would round them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fedflame.errors import UserError

BITS = 25
"""Bits after the point. The other seven hold the sign and values below 64."""
LARGEST = 2.0 ** (31 - BITS)


def to_ring(values: Tensor) -> np.ndarray:
    """Return values [n] as uint32 [n], rounded to the nearest multiple of 2^-`BITS`.

    Raises:
        UserError: a value is not finite, or not below `LARGEST`.
    """
    scaled = values.double().numpy() * 2.0**BITS
    if not (np.abs(scaled) < 2.0**31 - 0.5).all():  # NaN is below nothing
        raise UserError(
            f"an update has values that a masked sum cannot hold: all must be below {LARGEST:g}; "
            "try a smaller training.learning_rate"
        )
    return np.rint(scaled).astype(np.int64).astype(np.uint32)


def from_ring(total: np.ndarray) -> Tensor:
    """Return a sum in the ring, uint32 [n], as float64 [n]. It is right if its size is below `LARGEST`."""
    return torch.from_numpy(total.astype(np.int32).astype(np.float64) * 2.0**-BITS)
