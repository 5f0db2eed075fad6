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

from fedflame.errors import UserError
from fedflame.messages import Adapter, ClientUpdate, RoundPlan
from fedflame.run_files.residuals import read_residual, residual_path, residual_rounds, write_residual
from fedflame.training.update_norm import scaled_update, update_norm
from fedflame.wire.buffer import pack, unpack
from fedflame.wire.codec import decode_update, encode_update

_ROOM_FOR_ROUNDING = 0.99
"""A scaled update is rounded anew, to bfloat16 by up to 1 in 256 of each value."""


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
        earlier = [number for number in residual_rounds(self.folder, client) if number < round_number]
        if not earlier:
            return None
        path = residual_path(self.folder, client, earlier[-1])
        try:
            return Adapter.from_tensors(unpack(read_residual(path))[0])
        except ValueError as error:
            raise UserError(f"{path}: cannot be read ({error}); put back a copy of the file") from error

    def keep(self, client: int, round_number: int, residual: Adapter) -> None:
        """Store the client's residual after this round; one of a later round is of a run that was undone.

        Raises:
            UserError: the disk is full.
        """
        body = pack(residual.tensors(), {"round": round_number})
        write_residual(residual_path(self.folder, client, round_number), body)
        rounds = residual_rounds(self.folder, client)
        until_now = [number for number in rounds if number <= round_number]
        for old in {*rounds} - {*until_now[-self.checkpoints - 1 :]}:
            with suppress(OSError):
                residual_path(self.folder, client, old).unlink()


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
