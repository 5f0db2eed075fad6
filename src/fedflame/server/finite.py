"""A state is kept only if all its values, and the held-out losses that it gives, are finite."""

from __future__ import annotations

import math
from collections.abc import Iterator

from fedflame.errors import UserError
from fedflame.messages import Adapter
from fedflame.strategies.base import ServerState


class Diverged(UserError):
    """A state that must not be kept: what is not finite, in words that go on from "round 3: "."""


def require_finite_state(state: ServerState) -> None:
    """Raises `Diverged` for a value that is infinite or no number."""
    for what, adapter in _adapters(state):
        for name, value in adapter.tensors().items():
            if not bool(value.isfinite().all()):
                raise Diverged(f"{what} has a value in {name} that is not finite")
    for k, values in state.rescalers.items():
        if not bool(values.isfinite().all()):
            raise Diverged(f"the rescaler at k = {k} is not finite")


def require_finite_loss(loss: float, k: int) -> None:
    """Raises `Diverged` for a held-out loss that is infinite or no number."""
    if not math.isfinite(loss):
        raise Diverged(f"the held-out loss of the global model at k = {k} is {loss}")


def _adapters(state: ServerState) -> Iterator[tuple[str, Adapter]]:
    yield "the adapter", state.adapter
    yield "what is merged into the base", state.merged
    for k, adapter in state.tier_adapters.items():
        yield f"the adapter at k = {k}", adapter
