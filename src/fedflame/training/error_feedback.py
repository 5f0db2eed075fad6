"""Error feedback: the client remembers the rounding error of an update and adds it to its next update.

Seide et al., 1-bit SGD (Interspeech 2014); Karimireddy et al., Error Feedback Fixes SignSGD, arXiv
1901.09847. The error (residual) stays with the client, on disk. So memory does not grow with the number of
clients, and a resumed run has the same residuals as before.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from fedflame.atomic_file import write_atomically
from fedflame.errors import InvalidMessage, UserError
from fedflame.messages import Adapter, ClientUpdate, RoundPlan
from fedflame.training.update_norm import scaled_update, update_norm
from fedflame.wire.buffer import pack, unpack
from fedflame.wire.codec import decode_update, encode_update
from fedflame.wire.frame import seal, unseal

_ROOM_FOR_ROUNDING = 0.99
"""A scaled update is rounded anew, to bfloat16 by up to 1 in 256 of each value."""
_VERSION = 1
_KIND = "residual"


@dataclass(frozen=True)
class Residuals:
    """The residuals of each client after its last rounds: a folder per client, a sealed file per round."""

    folder: Path
    checkpoints: int = 1
    """The last rounds that the server may go on from; of one round more residuals are kept."""

    def before(self, client: int, round_number: int) -> Adapter | None:
        """Return the client's residual from the last round before this one; None if there is none.

        Raises:
            UserError: the file is damaged.
        """
        earlier = [path for path in self._files(client) if int(path.stem) < round_number]
        if not earlier:
            return None
        try:
            body = unseal(earlier[-1].read_bytes(), _VERSION, _KIND)
            return Adapter.from_tensors(unpack(body)[0])
        except (OSError, ValueError, InvalidMessage) as error:
            raise UserError(
                f"{earlier[-1]}: cannot be read ({error}); put back a copy of the file, or remove it: the "
                "client then owes nothing, and the run ends in other bytes"
            ) from error

    def keep(self, client: int, round_number: int, residual: Adapter) -> None:
        """Store the client's residual after this round; one of a later round is of a run that was undone.

        Raises:
            UserError: the disk is full.
        """
        path = self.folder / str(client) / f"{round_number}.sealed"
        write_atomically(path, seal(pack(residual.tensors(), {"round": round_number}), _VERSION))
        files = self._files(client)
        until_now = [file for file in files if int(file.stem) <= round_number]
        for old in {*files} - {*until_now[-self.checkpoints - 1 :]}:
            with suppress(OSError):
                old.unlink()

    def _files(self, client: int) -> list[Path]:
        """Return the client's files in ascending order of rounds."""
        files = (path for path in (self.folder / str(client)).glob("*.sealed") if path.stem.isdecimal())
        return sorted(files, key=lambda path: int(path.stem))


def encode_with_feedback(
    update: ClientUpdate, plan: RoundPlan, residuals: Residuals, max_norm: float = 0.0
) -> bytes:
    """Encode an update. With `error_feedback` in the plan, add the residual first and store the new one.

    Parts that are not sent (experts without activation, a frozen half) stay in the residual.

    Args:
        update: what the client learned.
        plan: the plan that it answers.
        residuals: where residuals are stored.
        max_norm: bound on the L2 norm of what is sent, residual and rounding included; 0 for none.

    Raises:
        UserError: the stored residual is damaged, or the disk is full.
    """
    owed = residuals.before(plan.client, plan.round) if plan.error_feedback else None
    if owed is not None:
        delta = update.delta.combine(owed.with_rank(update.delta.rank), torch.add)
        update = replace(update, delta=delta)
    if max_norm:
        update = _within(update, plan, max_norm)
    message = encode_update(update, plan)
    if not plan.error_feedback:
        return message
    residual = update.delta.combine(decode_update(message, plan).delta, torch.sub)
    if all(bool(value.isfinite().all()) for value in residual.tensors().values()):
        residuals.keep(plan.client, plan.round, residual)
    return message


def _within(update: ClientUpdate, plan: RoundPlan, max_norm: float) -> ClientUpdate:
    """Return the update, scaled down if what travels of it has a larger norm."""
    size = update_norm(decode_update(encode_update(update, plan), plan), plan)
    return update if size <= max_norm else scaled_update(update, plan, _ROOM_FOR_ROUNDING * max_norm / size)
