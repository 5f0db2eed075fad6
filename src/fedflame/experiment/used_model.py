"""What of a run is used: at each k its last round, or its best one (`server.load_best_model_at_end`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from fedflame.experiment.run_folder import saved_config
from fedflame.report.records import read_run

if TYPE_CHECKING:
    from fedflame.strategies.base import ServerState


def used_rounds(run: Path) -> dict[int, int]:
    """K -> its best round, where that is used; empty where the last round is.

    Raises:
        UserError: a file of the run folder is missing or damaged.
    """
    return read_run(run).used_rounds if saved_config(run).server.load_best_model_at_end else {}


def used_states(run: Path) -> Callable[[int], ServerState]:
    """What gives the state that is used at k. A k that is no tier has that of the largest.

    Raises:
        UserError: here and where it is called, a file is missing or damaged.
    """
    from fedflame.server.checkpoint import read_checkpoint

    rounds = used_rounds(run)
    largest = rounds[max(rounds)] if rounds else None

    @lru_cache(maxsize=1)
    def after(round_number: int | None) -> ServerState:
        return read_checkpoint(run, round_number).state

    return lambda k: after(rounds.get(k, largest))


def used_state(run: Path) -> ServerState:
    """What is used at every k, as one state.

    Where tiers have different rounds, it has an adapter for each, of one rank. What their rounds had merged
    into the base is then part of these adapters, as further ranks.

    Raises:
        UserError: see `used_states`.
    """
    from fedflame.messages import NOTHING  # from here on with torch

    rounds, state_at = used_rounds(run), used_states(run)
    if len({*rounds.values()}) < 2:
        return state_at(0)
    of_tier, rescalers = {}, {}
    for k in rounds:
        state = state_at(k)
        of_tier[k], rescalers[k] = state.total_at(k), state.rescalers[k]
    largest, rank = state_at(0), max(adapter.rank for adapter in of_tier.values())
    return replace(
        largest,
        adapter=largest.adapter.concatenate(largest.merged).with_rank(rank),
        rescalers=rescalers,
        merged=NOTHING,
        tier_adapters={k: adapter.with_rank(rank) for k, adapter in of_tier.items()},
    )
