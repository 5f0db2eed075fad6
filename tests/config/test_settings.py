"""The files of a hub and of a site: what is wrong is one line, and names of users are no keys of ours."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from pathlib import Path

import pytest
from tests.refusals import refusal_of

from fedflame.config.settings import SettingsFile, keys_of
from fedflame.engines.hub import Hub, load_hub
from fedflame.errors import UserError
from fedflame.trainer.site import Site, load_site

SITE = 'name = "a"\n[data]\ndataset_name = "x"\n[trainer]\nactive_experts = 2\n'
HUB = 'sites = "a,b"\n'


def refusal(load: Callable[[Path], SettingsFile], what: str, text: str, folder: Path) -> str:
    """What is said of a file with this text: one line that names it."""
    path = folder / f"{what}.toml"
    path.write_text(text)
    said = refusal_of(load, path)
    assert said.startswith(f"{what} file {path}: ")
    return said


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("name = ", "not TOML"),
        ('name = "a"', "data.dataset_name is missing"),
        ("[data]\n", "name is missing"),
        (SITE.replace("experts", "expert"), "unknown key 'trainer.active_expert'; the nearest valid key is "),
        ("data = 1\n" + HUB, "data is a section; write data.key=value"),
        (SITE.replace('"a"', '"a b"'), "name = 'a b'"),
        (SITE.replace("2", "0"), "trainer.active_experts = 0"),
        (SITE + "[models]\n", "at least one model"),
        (SITE + "[limits]\nmax_steps = 0\n", "limits.max_steps = 0"),
        ('folder = "/"\n' + SITE, "unknown key 'folder'"),
    ],
)
def test_a_broken_site_file_gets_one_line(text: str, reason: str, tmp_path: Path) -> None:
    assert reason in refusal(load_site, "site", text, tmp_path)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("sites", "not TOML"),
        ("", "sites is missing"),
        ('sites = "a,a"\n', "sites = 'a,a': "),
        ('sites = ["a", ""]\n', "sites = ['a', '']: "),
        ("sites = []\n", "sites = []: "),
        (
            HUB + "[round]\nround_timeout = 1\n",
            "unknown key 'round.round_timeout'; the nearest valid key is ",
        ),
        (HUB + "[rounds]\nround_timeout = 0\n", "rounds.round_timeout = 0"),
        (HUB + "[rounds]\nround_timeout = nan\n", "rounds.round_timeout = nan"),
        (HUB + "[rounds]\nstart_timeout = 0\n", "rounds.start_timeout = 0"),
        (HUB + "[rounds]\nstraggler_grace = 'later'\n", "rounds.straggler_grace = 'later': "),
        (HUB + "[rounds]\nstraggler_grace = true\n", "rounds.straggler_grace = True: "),
        (HUB + "[rounds]\nstraggler_grace = -1\n", "rounds.straggler_grace = -1: "),
        (HUB + "[rounds]\nstraggler_grace = inf\n", "rounds.straggler_grace = inf: "),
        (HUB + "[rounds]\nstraggler_grace = nan\n", "rounds.straggler_grace = nan: "),
        (HUB + "[flower]\nnodes = 7\n", "flower.nodes = 7"),
        (HUB + "flower = 7\n", "flower is a section; write flower.key=value"),
        (HUB + '[flower.nodes]\na = "x"\n', "flower.nodes.a = 'x'"),
    ],
)
def test_a_broken_hub_file_gets_one_line(text: str, reason: str, tmp_path: Path) -> None:
    assert reason in refusal(load_hub, "hub", text, tmp_path)


LEAST_OF_SITE = {
    "trainer.active_experts": 1, "trainer.max_active_experts": 0, "trainer.kept_runs": 1,
    "limits.max_rounds": 1, "limits.max_steps": 1, "limits.max_tokens": 1, "limits.max_flops": 0,
    "limits.max_rank": 1, "limits.max_memory": 0, "limits.max_seconds_per_round": 0,
    "limits.max_rounds_per_day": 0, "limits.max_runs": 0, "limits.min_rows_per_update": 1,
    "limits.min_tokens_per_update": 1, "limits.max_update_norm": 0,
}  # fmt: skip
LEAST_OF_HUB = {"rounds.rejoin_timeout": 0, "rounds.max_resubmissions": 0, "rounds.straggler_grace": 0}


@pytest.mark.parametrize(("key", "least"), LEAST_OF_SITE.items())
def test_the_least_number_of_a_site_is_taken_and_one_less_is_one_line(
    key: str, least: int, tmp_path: Path
) -> None:
    def with_number(number: int) -> str:
        values = {"name": "'a'", "data.dataset_name": "'x'", "trainer.active_experts": 2, key: number}
        return "".join(f"{name} = {value}\n" for name, value in values.items())

    (tmp_path / "good.toml").write_text(with_number(least))
    assert attrgetter(key)(load_site(tmp_path / "good.toml")) == least
    assert f"{key} = {least - 1}: " in refusal(load_site, "site", with_number(least - 1), tmp_path)


@pytest.mark.parametrize(("key", "least"), LEAST_OF_HUB.items())
def test_the_least_number_of_a_hub_is_taken_and_one_less_is_one_line(
    key: str, least: int, tmp_path: Path
) -> None:
    (tmp_path / "good.toml").write_text(f"{HUB}{key} = {least}\n")
    assert attrgetter(key)(load_hub(tmp_path / "good.toml")) == least
    assert f"{key} = {least - 1}: " in refusal(load_hub, "hub", f"{HUB}{key} = {least - 1}\n", tmp_path)


def test_files_know_their_folder_and_take_names_of_users_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "site.toml").write_text(SITE + '[models]\n"owner/x.y" = "m"\ndata = "n"\n')
    (tmp_path / "hub.toml").write_text(HUB + '[flower.nodes]\n"a.b" = 7\nrounds = 8\n')
    site, hub = load_site(tmp_path / "site.toml"), load_hub(tmp_path / "hub.toml")
    assert site.models == {"owner/x.y": "m", "data": "n"}
    assert hub.flower.nodes == {"a.b": 7, "rounds": 8}
    assert site.folder == hub.folder == tmp_path


def test_a_file_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    for load, what in ((load_site, "site"), (load_hub, "hub")):
        with pytest.raises(UserError, match=f"^{what} file .*none.toml: No such file or directory$"):
            load(tmp_path / "none.toml")


def test_keys_are_in_flat_form_and_the_folder_is_none() -> None:
    assert {"name", "models", "data.dataset_name", "flower.superlink"} <= set(keys_of(Site))
    assert {"sites", "rounds.round_timeout", "flower.nodes"} <= set(keys_of(Hub))
    assert "folder" not in keys_of(Site) + keys_of(Hub)
