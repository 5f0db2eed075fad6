"""The device of an experiment: what chooses it, what is loaded onto it, and what is kept of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pytest
from tests.fake_cards import MODEL, fake_cards, load_on_cpu
from tests.tiny_runs import SETTINGS, adapter_bytes, arguments, invoke, set_options, tiny_config, tiny_run

from fedflame.base import device
from fedflame.clients.local import LocalClients
from fedflame.clients.workers import WorkerSetup
from fedflame.config.sections import EMBEDDED_MODEL
from fedflame.cost.memory import least_training_memory
from fedflame.cost.model_shape import read_model_shape
from fedflame.data.federation import load_federation
from fedflame.errors import UserError
from fedflame.experiment.assemble import assemble
from fedflame.experiment.plan import plan_run
from fedflame.experiment.prepare import prepare
from fedflame.experiment.run import run_experiment
from fedflame.server.progress import LineReporter

ONE_ROUND = "server.num_server_rounds=1"
CARDS = (80_000_000_000, 24_000_000_000)
LINE = "device cuda:1, NVIDIA H200, 24.0 GB, CUDA 13.0, driver 580.65.06 (as model.device asks)\n"
NO_CARD = "fedflame: model.device = 'cuda': torch "


def test_the_base_is_loaded_onto_the_device_in_its_dtype(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = load_on_cpu(monkeypatch, "fedflame.experiment.assemble")
    fake_cards(monkeypatch, tmp_path, CARDS)
    config = tiny_config(Path(EMBEDDED_MODEL), tmp_path / "run", "model.device=cuda:1")
    experiment = assemble(config, load_federation(config))
    assert asked == [experiment.device.name] == ["cuda:1"]
    assert experiment.dtype.name == experiment.adapted.dtype == "bfloat16"


def test_a_run_shows_and_keeps_its_card_and_a_plan_shows_it_before(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_on_cpu(monkeypatch, "fedflame.experiment.assemble")
    fake_cards(monkeypatch, tmp_path, CARDS)
    settings = (ONE_ROUND, "model.device=cuda:1", "model.dtype=float32")
    shown = tiny_run(tiny_folder, tmp_path / "run", *settings)
    assert LINE in shown
    kept = json.loads((tmp_path / "run" / "environment.json").read_text())
    expected = {"device": "cuda:1", "gpu": MODEL, "gpu_memory": CARDS[1], "cuda": "13.0"}
    expected |= {"driver": "580.65.06", "dtype": "float32"}
    assert {key: kept[key] for key in expected} == expected
    asked = ["plan", "--model", tiny_folder]
    asked += set_options(*SETTINGS, *settings)
    assert LINE in invoke(*asked).stdout
    planned = json.loads(invoke(*asked, "--json").stdout)
    assert {key: planned[key] for key in expected if key != "dtype"} == {
        key: value for key, value in expected.items() if key != "dtype"
    }


def test_a_run_on_a_cpu_says_so(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "DRIVERS", ())
    shown = tiny_run(tiny_folder, tmp_path / "run", ONE_ROUND)
    assert "device cpu (this machine has no NVIDIA driver)\n" in shown
    kept = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert kept["device"] == "cpu" and kept.keys().isdisjoint({"gpu", "cuda", "driver"})


@pytest.mark.slow
@pytest.mark.parametrize("command", ["run", "plan", "evaluate"])
def test_a_command_takes_the_device_of_its_option(command: str, tiny_folder: Path, tmp_path: Path) -> None:
    given = {"run": arguments(tiny_folder, tmp_path / "run"), "plan": ["plan"]}
    words = given.get(command, ["evaluate", str(tiny_folder)])
    told = invoke(*words, "--set", "model.device=cpu", "--device", "cuda")
    assert told.exit_code == 2 and told.stderr.startswith(NO_CARD) and told.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_comparison_takes_the_device_of_its_option(tmp_path: Path) -> None:
    (tmp_path / "grid.toml").write_text("[methods.flame]\n")
    told = invoke("compare", tmp_path / "grid.toml", "--dry-run", "--device", "gpu")
    assert told.exit_code == 2 and "config: model.device = 'gpu': " in told.stderr


def test_a_plan_of_a_run_on_a_card_that_is_not_there_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^model\.device = 'cuda': torch "):
        plan_run(tiny_config(tiny_folder, tmp_path, "model.device=cuda"))


@pytest.mark.slow
def test_a_resumption_with_another_device_goes_on_and_says_so_in_one_line(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The card computes on the CPU here, so that the bytes are those of a run in one go."""
    monkeypatch.setattr(device, "DRIVERS", ())
    settings = ("server.num_server_rounds=2", "model.dtype=float32")
    shown = tiny_run(tiny_folder, tmp_path / "whole", *settings)
    assert "the run began on" not in shown
    tiny_run(tiny_folder, tmp_path / "run", *settings, "model.device=cpu")
    load_on_cpu(monkeypatch, "fedflame.experiment.assemble")
    fake_cards(monkeypatch, tmp_path, CARDS)
    changed = ("model.device=cuda", "training.gradient_checkpointing=layers")
    shown = tiny_run(tiny_folder, tmp_path / "run", *settings, *changed, existing="resume")
    line = (
        "the run began on a CPU and goes on with NVIDIA H200, which rounds otherwise: it ends in other bytes "
        "than a run on one of them"
    )
    assert shown.count(f"{line}\n") == 1
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(tmp_path / "whole")
    anew = tiny_run(tiny_folder, tmp_path / "run", *settings, existing="overwrite")
    assert "the run began on" not in anew
    again = tiny_run(tiny_folder, tmp_path / "run", *settings, existing="resume")
    assert "the run began on" not in again, "it began on this card"


@pytest.mark.parametrize(
    ("wanted", "workers", "others"),
    [
        ("auto", 2, ["cuda:1"]),
        ("auto", 4, ["cuda:1", "cuda:0", "cuda:1"]),
        ("cpu", 4, ["cpu", "cpu", "cpu"]),
    ],
)
def test_the_workers_of_a_run_take_the_cards_in_turn(
    wanted: str,
    workers: int,
    others: list[str],
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    load_on_cpu(monkeypatch, "fedflame.experiment.assemble")
    fake_cards(monkeypatch, tmp_path, CARDS)
    asked: list[str] = []

    def clients(own: LocalClients, setups: Sequence[WorkerSetup]) -> AbstractContextManager[LocalClients]:
        asked.extend(setup.device for setup in setups)
        return nullcontext(own)

    monkeypatch.setattr("fedflame.experiment.run.WorkerClients", clients)
    told: list[str] = []
    settings = (ONE_ROUND, "model.dtype=float32", f"model.device={wanted}")
    config = tiny_config(tiny_folder, tmp_path / "run", *settings)
    run_experiment(
        prepare(config), workers=workers, watch=lambda begun: nullcontext(LineReporter(told.append))
    )
    assert asked == others
    shared = ["4 workers on 2 cards: several share a card"] if (wanted, workers) == ("auto", 4) else []
    assert [line for line in told if "workers" in line] == shared


@pytest.mark.parametrize("workers", [1, 2])
def test_a_run_needs_room_for_every_worker_before_anything_is_loaded(
    workers: int, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = load_on_cpu(monkeypatch, "fedflame.experiment.assemble")
    config = tiny_config(tiny_folder, tmp_path / "run", ONE_ROUND, "model.dtype=float32")
    adapter, shape = config.adapter, read_model_shape(tiny_folder)
    needed = least_training_memory(shape, adapter.r, adapter.target_modules, "float32")
    fake_cards(monkeypatch, tmp_path, (workers * needed - 1,))
    with pytest.raises(UserError, match=r"^training at k = 4 with 4 rows per batch and "):
        run_experiment(prepare(config), workers=workers)
    assert asked == [] and not (tmp_path / "run").exists()
