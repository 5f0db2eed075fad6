"""The site's record of the rounds that it has trained or scored, which its limits on runs and rounds count.

Every line is one round or evaluation that began. It is on the disk before the work begins, so that no crash
leaves one uncounted. The same plan of the same run gives the same bytes again and is counted once.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args, get_type_hints

from fedflame.errors import UserError
from fedflame.trainer.refusal import Refusal
from fedflame.trainer.site import SiteLimits

FILE_NAME = "ledger.jsonl"
DAY_SECONDS = 86400.0


@dataclass(frozen=True)
class Round:
    """A round or an evaluation that began."""

    run: str
    plan: str
    """Digest of plan and job."""
    time: float
    """Seconds since 1970."""
    kind: Literal["train", "evaluate"] = "train"
    data: str = ""
    """The data set that a private round was trained on; empty for a round that was not private."""
    sampling_rate: float = 0.0
    noise_multiplier: float = 0.0
    steps: int = 0
    """Of a private round, with the two above; see `privacy.accounting.Spending`."""


def anything(rounds: Sequence[Round]) -> None:
    """What is checked where nothing but the number of rounds counts."""


def begin_round(
    folder: Path, begun: Round, limits: SiteLimits, check: Callable[[Sequence[Round]], None] = anything
) -> None:
    """Record a round or an evaluation in the ledger of this folder, unless it stands there.

    Args:
        folder: the site's state folder.
        begun: what begins.
        limits: of the site's file.
        check: raises Refusal if this cannot begin after the rounds in the ledger.

    Raises:
        Refusal: the site's limits on runs or rounds are reached, or the check fails.
        UserError: the ledger is damaged or cannot be written.
    """
    path = folder / FILE_NAME
    rounds = read_ledger(path)
    if any((known.run, known.plan) == (begun.run, begun.plan) for known in rounds):
        return
    require_allowed_number(rounds, begun.run, limits, begun.time, begun.kind)
    check(rounds)
    _append(path, begun)


def require_allowed_number(
    rounds: Sequence[Round],
    run: str,
    limits: SiteLimits,
    now: float,
    kind: Literal["train", "evaluate"] = "train",
) -> None:
    """Raise Refusal if another round of this run, or another evaluation, is one too many."""
    runs = {known.run for known in rounds}
    if limits.max_runs and run not in runs and len(runs) >= limits.max_runs:
        raise Refusal(f"this site has taken part in {len(runs)} runs; it allows at most {limits.max_runs}")
    # A clock that was set back makes no round uncounted.
    today = sum(known.time > now - DAY_SECONDS for known in rounds if known.kind == kind)
    if limits.max_rounds_per_day and today >= limits.max_rounds_per_day:
        done = "trained" if kind == "train" else "scored"
        raise Refusal(
            f"this site has {done} {today} rounds in 24 hours; it allows at most {limits.max_rounds_per_day}"
        )


def read_ledger(path: Path) -> list[Round]:
    """Return the rounds of a ledger; none if there is no file.

    A last line without its end was being written when the machine stopped; its round did not begin.

    Raises:
        UserError: the file cannot be read, or a line is no round.
    """
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    return [_round(path, number, line) for number, line in enumerate(lines, 1)]


def _round(path: Path, number: int, line: bytes) -> Round:
    try:
        found = Round(**json.loads(line))
        known = get_args(get_type_hints(Round)["kind"])
        types = [type(value) for value in asdict(found).values()]
        if types != [str, str, float, str, str, float, float, int] or found.kind not in known:
            raise TypeError("a value of another type")
        if not 0 <= found.sampling_rate <= 1 or not found.noise_multiplier >= 0 or found.steps < 0:
            raise ValueError("a number out of its range")
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(
            f"{path}, line {number}: no record of a round ({error}); without this file the site counts its "
            "runs and rounds from zero"
        ) from error
    return found


def _append(path: Path, record: Round) -> None:
    line = json.dumps(asdict(record)).encode() + b"\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with path.open("a+b") as file:
            file.seek(0)
            whole = file.read().rfind(b"\n") + 1
            file.truncate(whole)  # what a crash left of a line
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from error
