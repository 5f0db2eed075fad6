"""The checkpoints of a run folder: one sealed file per kept round. What needs their tensors is `server`'s.

`round-7.sealed` is of one of the last rounds, from which the run can go on. `best-3.sealed` is of an earlier
round, kept because a k has its best there. All that were best after the oldest of the last rounds are kept,
so that a run that goes on from any of the last rounds has them, too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedflame.atomic_file import write_atomically
from fedflame.errors import InvalidMessage, UserError
from fedflame.run_files import ADVICE
from fedflame.wire.envelope import Bytes
from fedflame.wire.frame import HEAD_BYTES, seal, unseal
from fedflame.wire.packed_header import SIZE_BYTES, header_size, packed_size, read_packed_header

FOLDER = "checkpoint"
FORMAT_VERSION = 3
KIND = "checkpoint"
_NAME = re.compile(r"(round|best)-(0|[1-9][0-9]{0,8})\.sealed")


@dataclass(frozen=True)
class Kept:
    """A checkpoint that is there, and how many bytes metrics.jsonl had when it was written."""

    round: int
    metrics_bytes: int


def checkpoint_path(run: Path, round_number: int) -> Path:
    """Return the path of the checkpoint after this round: among the best ones if it is only there."""
    last, best = _path(run, "round", round_number), _path(run, "best", round_number)
    return best if best.exists() and not last.exists() else last


def kept_rounds(run: Path) -> list[int]:
    """Return the last rounds whose checkpoints are there, in ascending order."""
    return _rounds(run, "round")


def best_kept(run: Path) -> list[int]:
    """Return the earlier rounds that are kept because they were best, in ascending order."""
    return _rounds(run, "best")


def kept_round(run: Path, wanted: int | None = None) -> int:
    """Return the round of a checkpoint that is there: the one that is wanted, or the last.

    Raises:
        UserError: there is none.
    """
    rounds = kept_rounds(run)
    if not rounds:
        raise UserError(f"{run / FOLDER}: the run has no checkpoint; put back a copy of it, or start anew")
    if wanted is not None and wanted not in rounds:
        kept = ", ".join(map(str, rounds))
        raise UserError(f"{run}: no checkpoint after round {wanted} is kept; there are those after {kept}")
    return rounds[-1] if wanted is None else wanted


def none_is_best(round_number: int) -> Collection[int]:
    """Return no round: what `write_sealed` keeps of earlier rounds unless a run is to have its best ones."""
    return ()


def write_sealed(
    run: Path,
    round_number: int,
    body: bytes,
    most: int,
    best_after: Callable[[int], Collection[int]] = none_is_best,
) -> None:
    """Write a checkpoint atomically, then remove those beyond the last `most` that were not best.

    Args:
        run: the run folder.
        round_number: the round of the checkpoint.
        body: its content.
        most: how many of the last rounds stay.
        best_after: gives the rounds that were best after a round. Those of the oldest that stays do, too.

    Raises:
        UserError: the disk is full or not writable. The checkpoints before are unchanged.
    """
    write_atomically(_path(run, "round", round_number), seal(body, FORMAT_VERSION))
    last = kept_rounds(run)[-most:]
    best = {*best_after(last[0])} - {*last}
    for number in best:
        with suppress(FileNotFoundError):  # it has its name already
            _path(run, "round", number).rename(_path(run, "best", number))
    _remove_others(run, last, best)


def read_sealed(run: Path, round_number: int) -> tuple[Bytes, dict[str, Any]]:
    """Return the body of a checkpoint, whose seal is checked, and its header.

    Raises:
        UserError: it is missing, truncated, damaged, foreign or of another version.
    """
    path = checkpoint_path(run, round_number)
    try:
        body = unseal(path.read_bytes(), FORMAT_VERSION, KIND)
        header = read_packed_header(body)
        _kept(header, round_number)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; {advice(run, round_number)}") from error
    except (InvalidMessage, ValueError) as error:
        raise UserError(f"{path}: {error}; {advice(run, round_number)}") from error
    return body, header


def last_kept(run: Path) -> Kept | None:
    """Return what the last checkpoint says of itself; None where there is none.

    Its length is checked, its seal is not: a checkpoint may have gigabytes.

    Raises:
        UserError: its header cannot be read, or it is truncated.
    """
    if not (rounds := kept_rounds(run)):
        return None
    path = checkpoint_path(run, rounds[-1])
    try:
        with path.open("rb") as file:
            start = file.read(HEAD_BYTES + SIZE_BYTES)[HEAD_BYTES:]
            start += file.read(header_size(start) - SIZE_BYTES)
            wanted, found = HEAD_BYTES + packed_size(start), path.stat().st_size
        if found != wanted:
            raise ValueError(f"{found:,} bytes, where it says that it has {wanted:,}")
        return _kept(read_packed_header(start), rounds[-1])
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {error}; {advice(run, rounds[-1])}") from error


def remove_later(run: Path, round_number: int) -> None:
    """Remove the checkpoints after this round, the last first: a kill on the way leaves the run whole.

    Raises:
        UserError: they cannot be removed.
    """
    _remove_others(run, [kept for kept in kept_rounds(run) if kept <= round_number], best_kept(run))


def advice(run: Path, damaged: int) -> str:
    """Return what to do where the checkpoint after this round cannot be used."""
    others = [str(kept) for kept in kept_rounds(run) if kept != damaged]
    if not others:
        return ADVICE
    return f"put back a copy of the file, or --resume-from {' or '.join(others)}"


def _remove_others(run: Path, last: Collection[int], best: Collection[int]) -> None:
    """Remove all but these checkpoints, and what a killed process left of one.

    The last round goes first, and the best ones after the rounds that need them.
    """
    stay = {_path(run, "round", number) for number in last} | {_path(run, "best", number) for number in best}
    others = [_path(run, "round", number) for number in reversed(kept_rounds(run))]
    others += [_path(run, "best", number) for number in best_kept(run)]
    others += sorted((run / FOLDER).glob("round-*.partial"))
    for path in others:
        if path not in stay:
            with suppress(FileNotFoundError):
                _remove(path)


def _path(run: Path, kind: str, round_number: int) -> Path:
    return run / FOLDER / f"{kind}-{round_number}.sealed"


def _rounds(run: Path, kind: str) -> list[int]:
    names = (_NAME.fullmatch(path.name) for path in (run / FOLDER).glob(f"{kind}-*"))
    return sorted(int(name[2]) for name in names if name)


def _remove(path: Path) -> None:
    try:
        path.unlink()
    except PermissionError as error:
        raise UserError(f"{path}: cannot be removed: {error.strerror}") from error


def _kept(header: dict[str, Any], round_number: int) -> Kept:
    """Raises ValueError where a header is not that of the checkpoint after this round."""
    number, size = header.get("round"), header.get("metrics_bytes")
    if header.get("kind") != KIND or number != round_number or type(size) is not int or size < 0:
        raise ValueError(f"it is not the checkpoint after round {round_number}")
    return Kept(round_number, size)
