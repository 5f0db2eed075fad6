"""Private runs from the command line: every method, the same bytes again, and what is said of them."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest
from rich.console import Console
from tests.altered_answers import interrupt
from tests.same_bits import assert_same_adapter
from tests.tiny_models import TOP_K, tiny_adapted
from tests.tiny_runs import adapter_bytes, arguments, events, invoke, tiny_config, tiny_run

from fedflame.commands.tables import print_privacy
from fedflame.config.methods import NAMED_METHODS
from fedflame.experiment.plan import plan_run
from fedflame.privacy import accounting
from fedflame.privacy.accounting import Spending, epsilon_of
from fedflame.report.records import read_run
from fedflame.server.checkpoint import read_checkpoint

pytestmark = pytest.mark.slow

PRIVATE = ("privacy.unit=row", "privacy.noise_multiplier=1.5", "server.num_server_rounds=2")


@pytest.fixture(scope="module")
def finished(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("private") / "run"
    result = invoke(*arguments(tiny_folder, run, *PRIVATE))
    assert result.exit_code == 0, result.stderr
    shown = " ".join(result.stdout.split())
    assert "Privacy of each row over the whole run" in shown
    most = max(event["epsilon"] for event in events(run, "privacy"))
    assert f"privacy: of each row at most epsilon = {most:.3g} was told, delta = 1e-05" in shown
    return run


def test_a_private_run_says_what_each_round_has_spent(finished: Path) -> None:
    rows = {
        client["client"]: client["rows"]
        for client in json.loads((finished / "partition.json").read_text())["clients"]
    }
    spent = events(finished, "privacy")
    assert [(e["round"], e["client"]) for e in spent] == [(n, client) for n in (1, 2) for client in (0, 1, 2)]
    for event in spent:
        rate = 4 / rows[event["client"]]
        assert (event["sampling_rate"], event["noise_multiplier"]) == (rate, 1.5)
        assert event["steps"] == 2 * event["round"] and event["delta"] == 1e-5
        assert event["epsilon"] == epsilon_of([Spending(rate, 1.5, event["steps"])], 1e-5) > 0
    updates = events(finished, "client")
    assert {e["loss"] for e in updates} == {None} and {str(e["counts"]) for e in updates} == {"[]"}
    assert not events(finished, "excluded")
    length = json.loads((finished / "plan.json").read_text())["sequence_length"]
    assert {e["tokens"] for e in updates} == {2 * 4 * length}, "the expected ones, not those of the rows"


def test_report_and_card_say_epsilon(finished: Path) -> None:
    most = max(event["epsilon"] for event in events(finished, "privacy"))
    assert read_run(finished).epsilon == most
    page = (finished / "report.html").read_text()
    assert "<h2>Privacy</h2>" in page and f"{most:.2f}" in page and "Epsilon after each round" in page
    assert "Tells no counts." in page and "Has not trained." not in page
    card = (finished / "adapter" / "README.md").read_text()
    assert f"epsilon = {most:.3g} at most, delta = 1e-05" in card


def test_a_run_that_is_not_private_says_nothing_of_it(tiny_folder: Path, tmp_path: Path) -> None:
    tiny_run(tiny_folder, tmp_path / "run", "server.num_server_rounds=1")
    assert not events(tmp_path / "run", "privacy") and read_run(tmp_path / "run").epsilon is None
    assert "Privacy" not in (tmp_path / "run" / "report.html").read_text()
    assert "Privacy" not in (tmp_path / "run" / "adapter" / "README.md").read_text()


@pytest.mark.parametrize("name", [name for name in NAMED_METHODS if name != "flame"])
def test_every_method_runs_privately(name: str, tiny_folder: Path, tmp_path: Path) -> None:
    settings = (*PRIVATE, f"strategy.name={name}", "privacy.clipping=ghost")
    tiny_run(tiny_folder, tmp_path / "run", *settings)
    assert len(events(tmp_path / "run", "privacy")) == 6 and not events(tmp_path / "run", "excluded")


def test_killed_and_resumed_it_ends_in_the_same_bytes(
    finished: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt(patch, (2, 1))
        tiny_run(tiny_folder, run, *PRIVATE)
    tiny_run(tiny_folder, run, *PRIVATE, existing="resume")
    one, other = (read_checkpoint(path).state for path in (finished, run))
    assert_same_adapter(one.total_at(TOP_K), other.total_at(TOP_K))
    assert adapter_bytes(run) == adapter_bytes(finished)
    assert events(run, "privacy") == events(finished, "privacy")


def test_the_noise_of_a_client_follows_from_its_rows_and_epsilon(tiny_folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = ("privacy.unit=row", "privacy.epsilon=3", "server.fraction_train=0.67")
    tiny_run(tiny_folder, run, *settings)
    asked: dict[int, int] = {}
    for event in events(run, "privacy"):
        asked[event["client"]] = asked.get(event["client"], 0) + 1
        assert event["steps"] == 2 * asked[event["client"]]
    assert set(asked.values()) != {3}, "not every client is asked in every round"
    last = {event["client"]: event["epsilon"] for event in events(run, "privacy")}
    assert all(2.9 < epsilon <= 3 for epsilon in last.values()), last


def test_a_plan_says_what_each_client_will_spend(tiny_folder: Path, finished: Path) -> None:
    command = arguments(tiny_folder, finished, *PRIVATE)[1:]
    place = command.index("--output-dir")
    options = [*command[:place], *command[place + 2 :]]
    shown = invoke("plan", *options)
    assert shown.exit_code == 0, shown.stderr
    assert "Privacy of each row over the whole run, delta = 1e-05" in shown.stdout
    assert "the noise of a step is" in shown.stdout
    planned = json.loads(invoke("plan", *options, "--json").stdout)["privacy"]
    last = {event["client"]: event for event in events(finished, "privacy")}
    for client in planned:
        told = last[client["client"]]
        for name in ("epsilon", "noise_multiplier", "sampling_rate", "steps"):
            assert client[name] == told[name], name


@pytest.mark.parametrize(
    ("batch", "helps"), [(4, "More rows in a step (training."), (64, "More rows at the client or")]
)
def test_noise_is_heard_against_the_rows_that_a_step_can_have(
    batch: int, helps: str, tiny_folder: Path, tmp_path: Path
) -> None:
    alone = ("clients.num_clients=1", "clients.active_experts=4", "privacy.unit=row",
             "privacy.noise_multiplier=10", f"training.per_device_train_batch_size={batch}")  # fmt: skip
    (client,) = plan_run(tiny_config(tiny_folder, tmp_path / "run", *alone)).privacy
    values = sum(value.numel() for value in tiny_adapted(r=3).adapter().tensors().values())
    assert 4 < client.rows < 64
    assert client.noise_over_clip == pytest.approx(10 * math.sqrt(values) / min(batch, client.rows))
    shown = io.StringIO()
    print_privacy([client], 1e-5, Console(file=shown, width=400))
    assert f"the noise of a step is {client.noise_over_clip:.0f} times" in shown.getvalue()
    assert helps in shown.getvalue()


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (("privacy.delta=0.5",), "it must be below"),
        (
            ("privacy.clipping=ghost", "training.gradient_checkpointing=layers"),
            "keeps what layers would compute again",
        ),
    ],
)
def test_what_cannot_be_private_is_refused_before_the_folder_is_there(
    settings: tuple[str, ...], line: str, tiny_folder: Path, tmp_path: Path
) -> None:
    result = invoke(*arguments(tiny_folder, tmp_path / "run", *PRIVATE, *settings))
    assert result.exit_code == 2 and line in result.stderr and result.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_without_the_package_one_line_says_what_to_install(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accounting._epsilon.cache_clear()
    monkeypatch.setattr(accounting, "find_spec", lambda name: None)
    result = invoke(*arguments(tiny_folder, tmp_path / "run", *PRIVATE))
    assert result.exit_code == 2 and "install fedflame[privacy]" in result.stderr
    assert not (tmp_path / "run").exists()
