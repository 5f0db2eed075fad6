"""A round that leaves something not finite is undone, and goes on without the clients that caused it."""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from tests.altered_answers import Change, falsify, huge, skip, times
from tests.message_samples import an_update
from tests.random_rounds import LAYERS, an_adapter
from tests.tiny_runs import adapter_bytes, events, tiny_run
from torch.linalg import LinAlgError

from fedflame.errors import UserError
from fedflame.messages import Adapter, ClientUpdate, RoundPlan
from fedflame.server.checkpoint import read_checkpoint
from fedflame.server.finite import Diverged, require_finite_loss, require_finite_state
from fedflame.server.scoring import evaluate_tiers
from fedflame.server.updates import _aggregate, _not_finite_alone
from fedflame.strategies.base import ServerState
from fedflame.training.scores import Scores

pytestmark = pytest.mark.slow

UNBOUNDED = ("strategy.clip=none", "server.num_server_rounds=3")


def a_state() -> ServerState:
    adapters = [an_adapter(torch.Generator().manual_seed(seed)) for seed in range(3)]
    return ServerState(
        adapters[0],
        {4: torch.ones(LAYERS), 1: torch.ones(LAYERS)},
        adapters[1],
        tier_adapters={1: adapters[2]},
    )


def spoiled(adapter: Adapter, value: float) -> Adapter:
    changed = adapter.combine(adapter, lambda one, _: one.clone())
    changed.experts["1.B1"][2, 3, 1] = value
    return changed


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_every_part_of_a_state_is_looked_at(value: float) -> None:
    state = a_state()
    require_finite_state(state)
    wrong = {
        "the adapter has": replace(state, adapter=spoiled(state.adapter, value)),
        "what is merged into the base": replace(state, merged=spoiled(state.merged, value)),
        "the adapter at k = 1": replace(state, tier_adapters={1: spoiled(state.tier_adapters[1], value)}),
        "the rescaler at k = 1": replace(state, rescalers=state.rescalers | {1: torch.tensor([1.0, value])}),
    }
    for words, bad in wrong.items():
        with pytest.raises(Diverged, match=words):
            require_finite_state(bad)
    require_finite_loss(1.0, 4)
    with pytest.raises(Diverged, match="k = 4 is"):
        require_finite_loss(value, 4)


@dataclass(frozen=True)
class Decomposing:
    """A method that meets a value which is not finite in a decomposition."""

    def aggregate_train(self, state: ServerState, updates: Iterable[ClientUpdate]) -> ServerState:
        raise LinAlgError("the input has values that are not finite")


def test_a_decomposition_that_fails_undoes_the_round_too() -> None:
    @dataclass(frozen=True)
    class Parts:
        strategy: Decomposing = Decomposing()

    with pytest.raises(Diverged, match="cannot be aggregated"):
        _aggregate(Parts(), a_state(), [])  # type: ignore[arg-type]


def test_a_disk_that_cannot_hold_what_a_method_keeps_there_is_one_line() -> None:
    @dataclass(frozen=True)
    class Writing:
        number: int

        def aggregate_train(self, state: ServerState, updates: Iterable[ClientUpdate]) -> ServerState:
            raise OSError(self.number, os.strerror(self.number))

    @dataclass(frozen=True)
    class Parts:
        strategy: Writing

    with pytest.raises(UserError, match="the disk cannot hold the updates of a round: No space left"):
        _aggregate(Parts(Writing(errno.ENOSPC)), a_state(), [])  # type: ignore[arg-type]
    with pytest.raises(BrokenPipeError):
        _aggregate(Parts(Writing(errno.EPIPE)), a_state(), [])  # type: ignore[arg-type]


def test_an_update_whose_state_alone_is_not_finite_is_to_blame_whatever_the_held_out_loss_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    @dataclass(frozen=True)
    class Spoiling:
        def aggregate_train(self, state: ServerState, updates: Iterable[ClientUpdate]) -> ServerState:
            return replace(state, adapter=spoiled(state.adapter, math.inf))

    @dataclass(frozen=True)
    class Parts:
        strategy: Spoiling = Spoiling()
        held_out: tuple[()] = ()

    monkeypatch.setattr("fedflame.server.rounds.require_finite_losses", lambda *_: None)
    found = _not_finite_alone(Parts(), a_state(), an_update())  # type: ignore[arg-type]
    assert found == "the adapter has a value in experts.1.B1 that is not finite"


def test_the_loss_of_the_first_ranks_must_be_finite_too(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(frozen=True)
    class Parts:
        tiers: tuple[()] = ()
        deployments: tuple[tuple[int, int], ...] = ((4, 2),)

    scores = {"all": Scores(rows=2, loss_sum=math.nan, response_tokens=3)}
    monkeypatch.setattr("fedflame.server.scoring._evaluate", lambda *_: scores)
    with pytest.raises(Diverged, match="the held-out loss of the global model at k = 4 is nan"):
        evaluate_tiers(Parts(), a_state(), 3)  # type: ignore[arg-type]


# Runs


def falsify_unbounded(monkeypatch: pytest.MonkeyPatch, change: Change) -> None:
    """Change what clients answer, where the bound of AdamW would not refuse it."""
    monkeypatch.setattr("fedflame.server.updates.require_within_reach", lambda *_: None)
    falsify(monkeypatch, change)


def far(update: ClientUpdate, plan: RoundPlan) -> ClientUpdate:
    """Client 1 sends finite values whose sum is not, in round 2."""
    return huge(update, plan) if (plan.client, plan.round) == (1, 2) else update


@pytest.mark.parametrize("overrides", [(), ("evaluation.evaluate_every=0",), ("strategy.name=flexlora",)])
def test_a_round_is_undone_without_the_client_that_caused_it_and_equals_one_without_it(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: tuple[str, ...]
) -> None:
    with monkeypatch.context() as patch:
        skip(patch, {(2, 1)})
        tiny_run(tiny_folder, tmp_path / "without", *UNBOUNDED, *overrides)
    falsify_unbounded(monkeypatch, far)
    shown = tiny_run(tiny_folder, tmp_path / "run", *UNBOUNDED, *overrides)
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(tmp_path / "without")
    (undone,) = events(tmp_path / "run", "undone")
    (excluded,) = events(tmp_path / "run", "excluded")
    assert undone["round"] == excluded["round"] == 2 and excluded["client"] == 1
    assert "by its update alone" in excluded["reason"]
    assert "round 2 is undone" in shown and "client 1 is left out: by its update alone" in " ".join(
        shown.split()
    )
    clients = [(event["round"], event["client"]) for event in events(tmp_path / "run", "client")]
    assert len(clients) == len(set(clients)), "the lines of the undone round are gone"
    assert "NaN" not in (tmp_path / "run" / "metrics.jsonl").read_text()


@pytest.mark.parametrize("every", [1, 0])
def test_a_loss_that_is_not_finite_undoes_a_round_whose_values_are(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int
) -> None:
    def large(update: ClientUpdate, plan: RoundPlan) -> ClientUpdate:
        return times(1e25)(update, plan) if (plan.client, plan.round) == (2, 1) else update

    falsify_unbounded(monkeypatch, large)
    tiny_run(tiny_folder, tmp_path / "run", *UNBOUNDED, f"evaluation.evaluate_every={every}")
    (undone,) = events(tmp_path / "run", "undone")
    assert "the held-out loss of the global model" in undone["reason"]
    (excluded,) = events(tmp_path / "run", "excluded")
    assert (excluded["round"], excluded["client"]) == (1, 2)


def test_where_no_client_alone_is_to_blame_the_run_ends_in_one_line_with_the_last_checkpoint(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    falsify_unbounded(monkeypatch, far)
    with monkeypatch.context() as patch, pytest.raises(UserError) as error:
        patch.setattr("fedflame.server.updates._not_finite_alone", lambda *_: "")
        tiny_run(tiny_folder, tmp_path / "run", *UNBOUNDED)
    assert str(error.value).startswith("round 2: the adapter has a value in experts.")
    assert str(error.value).endswith(
        "no client alone is to blame. The checkpoint of the round before is kept; "
        "a new run may need a smaller training.learning_rate"
    )
    assert "\n" not in str(error.value)
    assert read_checkpoint(tmp_path / "run").round == 1
    tiny_run(tiny_folder, tmp_path / "run", *UNBOUNDED, existing="resume")
    assert read_checkpoint(tmp_path / "run").round == 3
