"""The checkpoint: everything that the next round needs, in one sealed file.

It is written atomically, so that a crash or a full disk leaves the checkpoints before complete. Its seal is
that of a message: a version and a checksum over all that follows.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

from torch import Tensor

from fedflame.config.words import Trainable
from fedflame.errors import UserError
from fedflame.messages import MERGED_PREFIX, Adapter
from fedflame.run_files.checkpoints import (
    KIND,
    advice,
    best_kept,
    checkpoint_path,
    kept_round,
    none_is_best,
    read_sealed,
    write_sealed,
)
from fedflame.strategies.base import Past, ServerState
from fedflame.wire.buffer import pack, unpack

_FOREIGN = (ValueError, KeyError, TypeError, AttributeError, OverflowError)
"""The exceptions that a sealed file of something else can raise."""
_HALVES: dict[str, Trainable] = {half: half for half in get_args(Trainable)}
_RESCALERS = "rescalers."


@dataclass(frozen=True)
class Checkpoint:
    """The state after `round` rounds, and the length of metrics.jsonl at that time, in bytes."""

    round: int
    metrics_bytes: int
    state: ServerState


def write_checkpoint(
    run: Path,
    checkpoint: Checkpoint,
    save_total_limit: int = 1,
    best_after: Callable[[int], Collection[int]] = none_is_best,
) -> None:
    """Add a checkpoint to the run's, of which the last `save_total_limit` stay.

    Args:
        run: the run folder.
        checkpoint: what to add.
        save_total_limit: how many of the last rounds stay.
        best_after: gives the rounds that were best after a round; see `write_sealed`.

    Raises:
        UserError: the disk is full or not writable. The checkpoints before are unchanged.
    """
    state = checkpoint.state
    tensors = state.adapter.tensors() | state.merged.tensors(MERGED_PREFIX)
    tensors |= {f"{_RESCALERS}{k}": values for k, values in state.rescalers.items()}
    for k, adapter in state.tier_adapters.items():
        tensors |= adapter.tensors(_tier_prefix(k))
    header = {
        "kind": KIND,
        "round": checkpoint.round,
        "metrics_bytes": checkpoint.metrics_bytes,
        "trainable": state.trainable,
        "ranks": {str(client): rank for client, rank in state.ranks.items()},
        "tier_adapters": list(state.tier_adapters),
        "past": asdict(state.past),
    }
    write_sealed(run, checkpoint.round, pack(tensors, header), save_total_limit, best_after)


def read_checkpoint(run: Path, round_number: int | None = None) -> Checkpoint:
    """Read a checkpoint of the run, bit for bit as it was written: that after a kept round, or the last.

    Raises:
        UserError: there is no such checkpoint, or the file is truncated, damaged, foreign or of another
            version.
    """
    number = round_number if round_number in best_kept(run) else kept_round(run, round_number)
    body, header = read_sealed(run, number)
    try:
        tensors, _ = unpack(body)
        state = _state(tensors, header)
    except _FOREIGN as error:
        path = checkpoint_path(run, number)
        raise UserError(f"{path}: no fedflame checkpoint ({error}); {advice(run, number)}") from error
    return Checkpoint(number, int(header["metrics_bytes"]), state)


def _state(tensors: dict[str, Tensor], header: dict[str, Any]) -> ServerState:
    """Raises one of `_FOREIGN` where a part is missing or is of another type."""
    rescalers = {
        int(name.removeprefix(_RESCALERS)): tensors[name] for name in tensors if name.startswith(_RESCALERS)
    }
    return ServerState(
        Adapter.from_tensors(tensors),
        rescalers,
        Adapter.from_tensors(tensors, MERGED_PREFIX),
        _HALVES[header["trainable"]],
        {int(client): int(rank) for client, rank in header["ranks"].items()},
        {int(k): Adapter.from_tensors(tensors, _tier_prefix(k)) for k in header["tier_adapters"]},
        _read_past(header["past"]),
    )


def _read_past(values: dict[str, Any]) -> Past:
    """Return what `asdict` made of it; numbers of JSON come back bit for bit."""
    paces, rescaler_paces = (tuple(map(float, values[name])) for name in ("paces", "rescaler_paces"))
    return Past(float(values["reach"]), paces, rescaler_paces)


def _tier_prefix(k: int) -> str:
    """Return the prefix of the names in the adapter of tier k."""
    return f"k{k}."
