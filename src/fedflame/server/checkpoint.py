"""The checkpoint: one safetensors file with everything that the next round needs.

It is written atomically, so that a crash or a full disk leaves the previous checkpoint complete.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

from fedflame.atomic_file import write_atomically
from fedflame.config.words import Trainable
from fedflame.errors import UserError
from fedflame.messages import MERGED_PREFIX, Adapter
from fedflame.strategies.base import Past, ServerState
from fedflame.wire.buffer import pack, unpack

FILE_NAME = "checkpoint/state.safetensors"
FORMAT_VERSION = 3
_DAMAGE = (ValueError, KeyError, TypeError, AttributeError, OverflowError)
"""The exceptions that a foreign or truncated file can raise."""
_HALVES: dict[str, Trainable] = {half: half for half in get_args(Trainable)}


@dataclass(frozen=True)
class Checkpoint:
    """The state after `round` rounds, and the length of metrics.jsonl at that time, in bytes."""

    round: int
    metrics_bytes: int
    state: ServerState


def write_checkpoint(run: Path, checkpoint: Checkpoint) -> None:
    """Replace the run's checkpoint atomically.

    Raises:
        UserError: the disk is full or not writable. The previous checkpoint is unchanged.
    """
    state = checkpoint.state
    tensors = state.adapter.tensors() | state.merged.tensors(MERGED_PREFIX)
    tensors |= {f"rescalers.{k}": values for k, values in state.rescalers.items()}
    for k, adapter in state.tier_adapters.items():
        tensors |= adapter.tensors(_tier_prefix(k))
    header = {
        "version": FORMAT_VERSION,
        "round": checkpoint.round,
        "metrics_bytes": checkpoint.metrics_bytes,
        "trainable": state.trainable,
        "ranks": {str(client): rank for client, rank in state.ranks.items()},
        "tier_adapters": list(state.tier_adapters),
        "past": asdict(state.past),
    }
    write_atomically(run / FILE_NAME, pack(tensors, header))


def read_checkpoint(run: Path) -> Checkpoint:
    """Read the run's checkpoint, bit for bit as it was written.

    Raises:
        UserError: there is no checkpoint, or the file is truncated, foreign or of another version.
    """
    path = run / FILE_NAME
    try:
        buffer = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; the run has no checkpoint to go on from") from error
    try:
        tensors, header = unpack(buffer)
        _require_version(path, int(header["version"]))
        number, metrics_bytes = int(header["round"]), int(header["metrics_bytes"])
        trainable = _HALVES[header["trainable"]]
        ranks = {int(client): int(rank) for client, rank in header["ranks"].items()}
        tier_adapters = {
            int(k): Adapter.from_tensors(tensors, _tier_prefix(k)) for k in header["tier_adapters"]
        }
        past = _read_past(header["past"])
        prefix = "rescalers."
        rescalers = {int(name[len(prefix) :]): tensors[name] for name in tensors if name.startswith(prefix)}
    except _DAMAGE as error:
        raise UserError(
            f"{path}: truncated or no fedflame checkpoint ({error}); nothing was changed"
        ) from error
    adapter, merged = Adapter.from_tensors(tensors), Adapter.from_tensors(tensors, MERGED_PREFIX)
    state = ServerState(adapter, rescalers, merged, trainable, ranks, tier_adapters, past)
    return Checkpoint(number, metrics_bytes, state)


def _read_past(values: dict[str, Any]) -> Past:
    """Return what `asdict` made of it; numbers of JSON come back bit for bit."""
    paces, rescaler_paces = (tuple(map(float, values[name])) for name in ("paces", "rescaler_paces"))
    return Past(float(values["reach"]), paces, rescaler_paces)


def _tier_prefix(k: int) -> str:
    """Return the prefix of the names in the adapter of tier k."""
    return f"k{k}."


def _require_version(path: Path, version: int) -> None:
    if version != FORMAT_VERSION:
        raise UserError(f"{path}: checkpoint version {version}; this fedflame reads version {FORMAT_VERSION}")
