"""Attacks on runs whose canaries are known: what is learned by heart is found, and noise hides it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tests.tiny_runs import SETTINGS, arguments, invoke, tiny_config

from fedflame.errors import UserError
from fedflame.experiment import audit as module
from fedflame.experiment.audit import audit
from fedflame.server.sampling import rounds_of

pytestmark = pytest.mark.slow

REPEATED = (
    "clients.num_clients=1",
    "clients.active_experts=4",
    "data.max_rows=8",
    "server.num_server_rounds=2",
    "training.learning_rate=0.02",
    "training.max_steps=25",
    "training.per_device_train_batch_size=8",
)
"""One client with hardly any other rows: it sees every canary often enough to know it by heart."""


def test_what_is_learned_by_heart_is_found_and_noise_hides_it(tiny_folder: Path, tmp_path: Path) -> None:
    found = {}
    ways: dict[str, tuple[str, ...]] = {"open": (), "private": ("privacy.unit=row", "privacy.epsilon=2")}
    for name, settings in ways.items():
        config = tiny_config(tiny_folder, tmp_path / "never", *REPEATED, *settings)
        found[name] = audit(config, 30, 0)
    open_run, private = found["open"], found["private"]
    assert open_run.epsilon is None and private.epsilon is not None and 1.9 < private.epsilon <= 2
    assert open_run.attack.canaries == 30
    assert open_run.attack.auc > 0.8 and open_run.attack.proved_epsilon > 0.5
    assert private.attack.auc < 0.75 and private.attack.proved_epsilon <= private.epsilon
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize("client", [0, 2])
def test_in_a_masked_sum_the_hub_attacks_the_sum_whoever_of_the_group_it_looks_for(
    client: int, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spies = []

    class Watched(module._Spy):
        def __post_init__(self) -> None:
            super().__post_init__()
            spies.append(self)

    monkeypatch.setattr(module, "_Spy", Watched)
    summed = ("privacy.secure_aggregation=true", "clients.active_experts=4", "server.num_server_rounds=2")
    audit(tiny_config(tiny_folder, tmp_path / "never", *summed), 30, client)
    (spy,) = spies
    assert spy.seen == 2, "the one sum of each of two rounds"
    assert (spy.fallen != 0).all()


def test_a_client_that_was_in_no_round_is_one_line_and_no_figure(tiny_folder: Path, tmp_path: Path) -> None:
    config = tiny_config(
        tiny_folder, tmp_path / "run", "server.fraction_train=0.4", "server.num_server_rounds=1"
    )
    (asked,) = {number for number in range(3) if rounds_of(config, range(3), number, 1)}
    for client in range(3):
        if client == asked:
            assert audit(config, 20, client).attack.canaries == 20
        else:
            with pytest.raises(UserError, match=f"client {client} was in no round of this run"):
                audit(config, 20, client)


def test_canaries_are_rows_of_their_own_and_in_by_a_coin() -> None:
    rows, inside = module._canaries(400, 0)
    assert len({row.content for row in rows}) == 400 and 150 < inside.sum() < 250
    again, same = module._canaries(400, 0)
    assert again == rows and bool((same == inside).all())
    other, _ = module._canaries(400, 1)
    assert not {row.content for row in other} & {row.content for row in rows}


def test_only_canaries_that_are_in_are_among_the_rows_of_the_client(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = {}

    def looked_at(prepared, strategy, watch):  # type: ignore[no-untyped-def]
        seen["federation"], seen["spy"] = prepared.federation, strategy
        raise UserError("enough")

    monkeypatch.setattr(module, "run_experiment", looked_at)
    with pytest.raises(UserError, match="enough"):
        audit(tiny_config(tiny_folder, tmp_path / "run"), 40, 1)
    federation, rows = seen["federation"], seen["spy"].rows
    _, inside = module._canaries(40, 0)
    of_client = [federation.training[index] for index in federation.parts[1]]
    assert [row in of_client for row in rows] == inside.tolist()
    others = [federation.training[index] for part in (0, 2) for index in federation.parts[part]]
    assert not any(row in others or row in federation.held_out for row in rows)


def test_the_command_says_both_and_what_it_means(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    private = ("privacy.unit=row", "privacy.noise_multiplier=1.5")  # none is searched for
    command = arguments(tiny_folder, tmp_path, *private, "server.num_server_rounds=1")[1:]
    place = command.index("--output-dir")
    result = invoke("audit", *command[:place], *command[place + 2 :], "--canaries", "30", "--client", "1")
    assert result.exit_code == 0, result.stderr
    text = " ".join(result.stdout.split())
    assert "running as configured, with 30 canaries at client 1" in text and "without privacy" in text
    assert "epsilon claimed" in text and "AUC 0.5 is guessing" in text and "This is a bug" not in text


def test_more_proof_than_is_claimed_is_called_a_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    from fedflame.commands import audit as command

    inside = np.arange(400) % 2 == 0
    sure = module.Audited(module.attack(inside.astype(float), inside, 1e-5), 0.5)
    assert "more was proved than is claimed. This is a bug" in "".join(command._in_words({"private": sure}))


@pytest.mark.parametrize(("client", "line"), [(3, "client 3: must be from 0 to 2"), (-1, "client -1")])
def test_a_client_that_is_not_there_is_one_line(
    client: int, line: str, tiny_folder: Path, tmp_path: Path
) -> None:
    assert SETTINGS
    with pytest.raises(UserError, match=line):
        audit(tiny_config(tiny_folder, tmp_path / "run"), 40, client)
