"""The bounds of a comparison, each beside a second route: training by hand, and a run with one client."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.same_bits import assert_same_adapter
from tests.tiny_runs import SETTINGS, events, tiny_config

import fedflame
from fedflame.compare.bounds import Bound, bound_settings
from fedflame.config.load import load_config
from fedflame.config.run_config import RunConfig
from fedflame.data.conversations import Conversation
from fedflame.data.encoder import pad_token
from fedflame.data.federation import load_federation
from fedflame.errors import UserError
from fedflame.experiment.assemble import assemble
from fedflame.experiment.prepare import prepare
from fedflame.messages import RoundPlan
from fedflame.server.checkpoint import read_checkpoint
from fedflame.training.evaluation import evaluate
from fedflame.training.fine_tune import fine_tune
from fedflame.training.scores import total

SCORED = "server.fraction_evaluate=1"
SLOWER = "server.fraction_train=0.67"
"""Two of three clients in each round."""


def bound(which: Bound, name: str, model: Path, run: Path, *overrides: str) -> RunConfig:
    base = tiny_config(model, run, SCORED, *overrides)
    return load_config(base, bound_settings(which, base)[name])


def test_a_client_alone_is_trained_by_hand_over_the_rounds(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, rounds = 1, 3
    config = bound("standalone", "standalone-1", tiny_folder, tmp_path / "run")
    plans = list[RoundPlan]()

    def noted(adapted, examples, plan, *rest):  # type: ignore[no-untyped-def]
        plans.append(plan)
        return fine_tune(adapted, examples, plan, *rest)

    monkeypatch.setattr("fedflame.clients.local.fine_tune", noted)
    run = fedflame.run(config)
    assert [(plan.client, plan.round) for plan in plans] == [(client, number) for number in (1, 2, 3)]

    experiment = assemble(config, load_federation(config))
    rows, pad = experiment.encoded.clients[client], pad_token(experiment.encoder.tokenizer)
    adapter, s = experiment.adapted.initial_adapter(config.seed), torch.ones(len(experiment.adapted.layers))
    for number in range(1, rounds + 1):
        rate = 5e-3 * 0.5 * (1 + math.cos(math.pi * (number - 1) / rounds))
        plan = replace(
            plans[0], round=number, adapter=adapter, rescaler_values=s, learning_rate=rate,
            active_experts=2, max_steps=2,
        )  # fmt: skip
        update = fine_tune(experiment.adapted, rows, plan, pad)
        adapter, s = adapter.combine(update.delta, torch.add), update.rescaler_values
    state, step = read_checkpoint(run.folder).state, config.training.learning_rate
    # FLAME's mean of one client rounds w d / w; AdamW makes of that a part of its step, which is the rate.
    for name, value in adapter.tensors().items():
        torch.testing.assert_close(state.adapter_at(2).tensors()[name], value, rtol=0, atol=1e-3 * step)
    torch.testing.assert_close(state.rescalers[2], s, rtol=0, atol=1e-3 * step)
    scored = [e for e in events(run.folder, "client_evaluation") if e["round"] == rounds]
    assert [e["client"] for e in scored] == [client], "nobody else sees what it has learned"
    by_hand = total(evaluate(experiment.adapted, experiment.tests[client], adapter, 2, s, generate=False))
    assert scored[0]["loss"] == pytest.approx(by_hand.loss, rel=1e-5)
    assert scored[0]["loss"] < next(e["loss"] for e in events(run.folder, "client_evaluation"))


def as_row(row: Conversation) -> dict[str, str]:
    return {"instruction": row.turns[0].content, "output": row.response, "category": row.category}


@pytest.mark.slow
def test_centralised_is_a_run_with_one_client_that_has_all_rows(tiny_folder: Path, tmp_path: Path) -> None:
    config = bound("centralised", "centralised", tiny_folder, tmp_path / "run")
    run = fedflame.run(config)
    federation = load_federation(config)
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text("".join(json.dumps(as_row(row)) + "\n" for row in federation.held_out))
    plain = [setting for setting in SETTINGS if "clients" not in setting]
    one = load_config(None, [
        *plain, "data.max_rows=0", "clients.num_clients=1", "clients.active_experts=4",
        "training.max_steps=6",
        "strategy.k_rotation=none", "strategy.tier_affinity=1", "strategy.clip=none",
        f"evaluation.dataset_name={held_out}", f"model.model_name_or_path={tiny_folder}",
        f"output_dir={tmp_path / 'one'}",
    ])  # fmt: skip
    other = fedflame.run(one, data=[[as_row(row) for row in federation.training]])
    assert_same_adapter(run.adapter(), other.adapter())
    assert run.scores[3][4]["loss"] == other.scores[3][4]["loss"]
    scored = [e for e in events(run.folder, "client_evaluation") if e["round"] == 3]
    assert [(e["client"], e["active_experts"]) for e in scored] == [(0, 4), (1, 4), (2, 4)]
    assert [e["rows"] for e in scored] == [len(rows) for rows in federation.tests]


def test_a_bound_takes_as_many_steps_as_the_federation(tiny_folder: Path, tmp_path: Path) -> None:
    more = (SLOWER, "training.max_steps=12", "training.warmup_steps=6")
    alone = bound("standalone", "standalone-2", tiny_folder, tmp_path, *more)
    assert (alone.training.max_steps, alone.training.warmup_steps) == (8, 4), "in two of three rounds"
    central = bound("centralised", "centralised", tiny_folder, tmp_path, *more)
    assert (central.training.max_steps, central.training.warmup_steps) == (24, 12), (
        "two clients in each round"
    )
    assert alone.clients_per_round() == central.clients_per_round() == 3
    epochs = (SLOWER, "training.num_train_epochs=3")
    for which, name in (("standalone", "standalone-0"), ("centralised", "centralised")):
        config = bound(which, name, tiny_folder, tmp_path, *epochs)  # type: ignore[arg-type]
        assert config.training.num_train_epochs == pytest.approx(2)
    assert set(bound_settings("standalone", tiny_config(tiny_folder, tmp_path))) == {
        "standalone-0", "standalone-1", "standalone-2",
    }  # fmt: skip


def test_what_a_client_alone_has_learned_is_the_mean_of_itself(tiny_folder: Path, tmp_path: Path) -> None:
    """Nothing is clipped, mixed between tiers, rounded or held near a mean."""
    config = bound(
        "standalone", "standalone-0", tiny_folder, tmp_path,
        "training.proximal_mu=1", "communication.update_dtype=int8", "server.min_clients=2",
    )  # fmt: skip
    strategy = config.strategy
    assert (strategy.clip, strategy.tier_affinity, strategy.k_rotation) == ("none", 1.0, "none")
    assert (config.training.proximal_mu, config.communication.update_dtype) == (0.0, "float32")
    assert config.server.min_clients == 1


def test_over_sites_there_are_no_bounds(tiny_folder: Path, tmp_path: Path) -> None:
    sites: Any = object()
    with pytest.raises(UserError, match="sites train on the rows that they have"):
        prepare(tiny_config(tiny_folder, tmp_path / "run", "data.trained_by=one"), sites=sites)
