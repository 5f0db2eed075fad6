"""Clipping: no update counts for more than `FACTOR` times what updates usually are, whatever the method.

The pace of an update is the root mean square of what the values that it could move have moved, divided by
the root of the summed squares of its steps' learning rates: learning rate * sqrt(steps) where it is constant.
AdamW moves every value by about the learning rate in each step, in directions that mostly change, so that
honest paces are alike for all k, ranks, methods, learning rates and rounds: benchmarks/attacks has what was
measured. A learned rescaler has a pace of its own, over its layers.

The paces of earlier rounds are those of updates as they came. A client far from the others does not move
their median, and clients of a false majority do not hold it down once they are a minority.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median_low

import torch
from torch import Tensor

from fedflame.messages import NOTHING, Adapter, ClientUpdate, RoundPlan, is_trained
from fedflame.server.spool import Spool
from fedflame.strategies.base import Past
from fedflame.training.schedule import learning_rates

FACTOR = 1.5
"""An update may have this many times the median pace. See benchmarks/attacks for 1, 1.5 and 2."""
WINDOW = 64
"""Paces that are remembered: several rounds, so that chance in who is sampled does not decide."""
_BANKS = ("A1", "B1", "A2", "B2")
OUTLIER = 3.0
"""An update with this many times the median pace of its round is reported. Honest ones had at most 1.4."""


@dataclass(frozen=True)
class Pace:
    """How far an update went."""

    delta: float
    rescaler: float | None
    """None where the client did not learn it."""


@dataclass(frozen=True)
class Taken:
    """A valid update, and what clipping needs to know of its plan."""

    update: ClientUpdate
    start: Tensor
    """[L] s per MoE layer that the client was given."""
    norms: Mapping[str, float]
    """L2 norms of the delta by kind (A1, B1, A2, B2, attention), and of the rescaler's step."""
    pace: Pace
    """Of the update as it came."""
    share: float = 1.0
    """What clipping left of the delta or of the rescaler's step, the smaller of the two."""

    def without_delta(self) -> Taken:
        """Return the same without the tensors of the delta."""
        return replace(self, update=replace(self.update, delta=NOTHING))


@dataclass(frozen=True)
class Limits:
    """The largest pace of a delta and of a rescaler."""

    delta: float = math.inf
    rescaler: float = math.inf


def taken(update: ClientUpdate, plan: RoundPlan) -> Taken:
    """Measure an update."""
    step = update.rescaler_values - plan.rescaler_values
    norms = {**delta_norms(update.delta), "rescaler": _norm(step)}
    # A method may give a client a rate of zero, at which nothing moves.
    unit = max(math.hypot(*learning_rates(plan, update.steps)), sys.float_info.min)
    whole = _together(norm for kind, norm in norms.items() if kind != "rescaler")
    pace = Pace(
        whole / math.sqrt(max(1, _movable(update))) / unit,
        norms["rescaler"] / math.sqrt(len(step)) / unit if plan.rescaler == "learned" else None,
    )
    return Taken(update, plan.rescaler_values, norms, pace)


def delta_norms(delta: Adapter) -> dict[str, float]:
    """Return the L2 norm over all layers by kind of bank, and that of attention.

    They do not depend on the order of the values, which is another one after a resumption.
    """
    banks: dict[str, list[float]] = {bank: [] for bank in _BANKS}
    for name, value in delta.experts.items():
        banks[name.rpartition(".")[2]].append(_norm(value))
    found = {bank: _together(norms) for bank, norms in banks.items() if norms}
    return found | {"attention": _together(map(_norm, delta.attention.values()))}


def clipped(stream: Iterable[Taken], past: Past, rule: str, folder: Path) -> Iterator[Taken]:
    """Yield the updates, those that went too far scaled down; see `scaled`.

    The first round has no earlier one: its updates wait in a file in `folder` until all paces are known. With
    a rule that needs none, and in later rounds, one update is in memory at a time.

    Args:
        stream: the round's valid updates.
        past: what earlier rounds had.
        rule: `strategy.clip`.
        folder: where updates may wait.

    Raises:
        UserError: the disk is full.
    """
    if rule != "median" or past.paces:
        found = limits(past, rule)
        yield from (scaled(one, found) for one in stream)
        return
    with Spool(folder) as spool:
        waiting = [replace(one, update=spool.put(one.update)) for one in stream]
        found = limits(remembered(past, [one.pace for one in waiting]), rule)
        for one, update in zip(waiting, spool, strict=True):
            yield scaled(replace(one, update=update), found)


def limits(past: Past, rule: str) -> Limits:
    """Return the largest paces that `strategy.clip` allows: none, a number, or by the medians of `past`.

    Of an even number the lower of the two in the middle counts, so that one of two clients decides nothing.
    """
    if rule == "none":
        return Limits()
    if rule != "median":
        return Limits(float(rule), float(rule))
    return Limits(_usual_times_factor(past.paces), _usual_times_factor(past.rescaler_paces))


def scaled(one: Taken, most: Limits) -> Taken:
    """Scale the delta and the rescaler's step down to these paces. What is within them keeps its bits."""
    update = one.update
    share, of_step = _share(one.pace.delta, most.delta), _share(one.pace.rescaler, most.rescaler)
    if share < 1:
        update = replace(update, delta=update.delta.combine(update.delta, lambda value, _: share * value))
    if of_step < 1:
        step = update.rescaler_values - one.start
        update = replace(update, rescaler_values=one.start + of_step * step)
    return replace(one, update=update, share=min(share, of_step))


def remembered(past: Past, paces: Sequence[Pace]) -> Past:
    """Return `past` with these paces added, the last `WINDOW` of all."""
    deltas = [*past.paces, *(pace.delta for pace in paces)]
    rescalers = [*past.rescaler_paces, *(pace.rescaler for pace in paces if pace.rescaler is not None)]
    return replace(past, paces=tuple(deltas[-WINDOW:]), rescaler_paces=tuple(rescalers[-WINDOW:]))


def outliers(paces: Sequence[Pace]) -> dict[int, float]:
    """Return those with over `OUTLIER` times the median of the round: position -> that many times."""
    usual = median_low(pace.delta for pace in paces) if paces else 0.0
    times = {at: pace.delta / usual for at, pace in enumerate(paces) if usual > 0}
    return {at: value for at, value in times.items() if value > OUTLIER}


def _share(pace: float | None, most: float) -> float:
    return most / pace if pace is not None and pace > most else 1.0


def _usual_times_factor(paces: Sequence[float]) -> float:
    return FACTOR * median_low(paces) if paces else math.inf


def _together(norms: Iterable[float]) -> float:
    """Return the L2 norm of the parts with these norms; an exact sum has no order."""
    return math.sqrt(math.fsum(norm * norm for norm in norms))


def _norm(value: Tensor) -> float:
    return float(torch.linalg.vector_norm(value, dtype=torch.float64))


def _movable(update: ClientUpdate) -> int:
    """Return the number of values that the client trained: of activated experts, and of attention."""
    activated = (update.counts > 0).sum(1).tolist()
    experts: int = sum(
        activated[int(name.split(".")[0])] * value[0].numel()
        for name, value in update.delta.experts.items()
        if is_trained(name, update.trainable)
    )
    attention = update.delta.attention.items()
    return experts + sum(value.numel() for name, value in attention if is_trained(name, update.trainable))
