"""Error feedback: what rounding took from a client's delta is added to its next one.

Seide et al., 1-bit SGD (Interspeech 2014); Karimireddy et al., Error Feedback Fixes SignSGD, arXiv
1901.09847. What is owed stays with the client, on disk: memory does not grow with the number of clients, and
a run that goes on after a crash owes what it owed.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from fedflame.atomic_file import write_atomically
from fedflame.errors import UserError
from fedflame.messages import Adapter, ClientUpdate, RoundPlan
from fedflame.wire.buffer import pack, unpack
from fedflame.wire.codec import decode_update, encode_update

_KEPT = 2
"""Rounds that are kept: the last, and the one before it, in case that the server asks for the last again."""


@dataclass(frozen=True)
class Residuals:
    """What each client owes after each of its last rounds; one folder per client."""

    folder: Path

    def before(self, client: int, round_number: int) -> Adapter | None:
        """What the client owes from rounds before this one; None for nothing.

        Raises:
            UserError: the file is damaged.
        """
        earlier = [path for path in self._files(client) if int(path.stem) < round_number]
        if not earlier:
            return None
        try:
            return Adapter.from_tensors(unpack(earlier[-1].read_bytes())[0])
        except (OSError, ValueError) as error:
            raise UserError(
                f"{earlier[-1]}: cannot be read ({error}); without the file the client owes nothing"
            ) from error

    def keep(self, client: int, round_number: int, residual: Adapter) -> None:
        """Write down what the client owes after this round. Raises UserError where the disk is full."""
        path = self.folder / str(client) / f"{round_number}.safetensors"
        write_atomically(path, pack(residual.tensors(), {"round": round_number}))
        for old in self._files(client)[:-_KEPT]:
            with suppress(OSError):
                old.unlink()

    def _files(self, client: int) -> list[Path]:
        """In rising order of rounds."""
        return sorted((self.folder / str(client)).glob("*.safetensors"), key=lambda path: int(path.stem))


def encode_with_feedback(update: ClientUpdate, plan: RoundPlan, residuals: Residuals) -> bytes:
    """`encode_update` of the delta plus what the client owes, where the plan asks for that.

    What does not travel (experts without activation, a frozen half) is owed on.
    """
    if not plan.error_feedback:
        return encode_update(update, plan)
    owed = residuals.before(plan.client, plan.round)
    if owed is not None:
        delta = update.delta.combine(owed.with_rank(update.delta.rank), torch.add)
        update = replace(update, delta=delta)
    message = encode_update(update, plan)
    residual = update.delta.combine(decode_update(message, plan).delta, torch.sub)
    if all(bool(value.isfinite().all()) for value in residual.tensors().values()):
        residuals.keep(plan.client, plan.round, residual)
    return message
