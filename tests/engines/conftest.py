"""The experiment that runs over both engines and in one process, and a driver that waits for no one long."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.preloaded import command_words

from fedflame.privacy.identity import identity, public
from loopback import SITES, Loopback, fedflame, wait_until_good

EXPERIMENT = """\
[data]
max_rows = 500
[clients]
num_clients = 3
active_experts = "8,4,1"
[training]
max_steps = 3
learning_rate = 0.001 # no count becomes more than eight times the even one, which is all that a hub believes
[server]
num_server_rounds = 2
fraction_evaluate = 1
[evaluation]
rows_per_category = 1
client_test_size = 0.03
max_new_tokens = 1
evaluate_every = 0
generate_every = 0
"""


@pytest.fixture(scope="session")
def forked_commands() -> Iterator[None]:
    """`fedflame` commands of federations start from a process that has imported torch once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("loopback.FEDFLAME", command_words())
        yield


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("experiment") / "experiment.toml"
    path.write_text(EXPERIMENT)
    return path


ONE_ROUND_OF_EQUAL_K = EXPERIMENT.replace('"8,4,1"', "1").replace(
    "num_server_rounds = 2", "num_server_rounds = 1"
)


@pytest.fixture(scope="module")
def masked(experiment: Path) -> Path:
    """One round of the same sites with equal k, whose updates are summed under masks."""
    path = experiment.with_name("masked.toml")
    unscored = ONE_ROUND_OF_EQUAL_K.replace("fraction_evaluate = 1\n", "")
    path.write_text(f"{unscored}[privacy]\nsecure_aggregation = true\n")
    return path


@pytest.fixture(scope="module")
def unmasked(experiment: Path, forked_commands: None) -> Path:
    """The same in one process without masks, on the same rows."""
    path, run = experiment.with_name("unmasked.toml"), experiment.parent / "unmasked"
    path.write_text(f'{ONE_ROUND_OF_EQUAL_K}[strategy]\nclip = "none"\nk_rotation = "none"\n')
    done = fedflame("run", path, "--output-dir", run)
    assert done.returncode == 0, done.stdout
    return run


def let_sites_know_each_other(federation: Loopback) -> None:
    """Write the key of every site into the files of the others, and start their trainers anew.

    From then on they take part in masked sums only.
    """
    places = {site: federation.folder / site for site in SITES}
    keys = {site: public(identity(place / "state")) for site, place in places.items()}
    for site, place in places.items():
        lines = "".join(f'{other} = "{key}"\n' for other, key in keys.items() if other != site)
        with (place / "site.toml").open("a") as file:
            file.write(f"\n[peers]\n{lines}")
        federation.services[f"{site} trainer"].process.kill()
    wait_until_good([("site", "check", place / "site.toml") for place in places.values()])


@pytest.fixture(scope="module")
def finished(experiment: Path, forked_commands: None) -> Path:
    """The experiment in one process."""
    run = experiment.parent / "one-process"
    done = fedflame("run", experiment, "--output-dir", run)
    assert done.returncode == 0, done.stdout
    return run


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver that asks and looks again after hundredths of a second."""
    monkeypatch.setattr("fedflame.engines.clients.BACKOFF_SECONDS", 0.01)
    monkeypatch.setattr("fedflame.engines.clients.POLL_SECONDS", 0.02)
    monkeypatch.setattr("fedflame.engines.clients.REJOIN_POLL_SECONDS", 0.02)
    monkeypatch.setattr("fedflame.engines.jobs.POLL_SECONDS", 0.02)


@pytest.fixture
def whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans of a few bytes that are no plans: nothing of them is held by a site, and any answer fits."""
    monkeypatch.setattr("fedflame.engines.clients.encode_addition", lambda plan, held: None)
    monkeypatch.setattr("fedflame.engines.clients.encoded_update_limit", lambda plan: 10**6)
    monkeypatch.setattr("fedflame.engines.clients.encoded_plan_work", lambda plan: 1.0)
