"""The files in configs/run load, and say what their comments say."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from fedflame.config.load import load_config
from fedflame.config.run_config import RunConfig
from fedflame.config.settings import refuse_unknown_keys, validated
from fedflame.engines.hub import Hub
from fedflame.trainer.site import Site

FOLDER = Path(__file__).parents[2] / "configs" / "run"


@pytest.mark.parametrize("name", ["laptop", "one-gpu", "sites"])
def test_the_file_loads_and_every_key_in_it_is_used(name: str) -> None:
    values = tomllib.loads((FOLDER / f"{name}.toml").read_text(encoding="utf-8"))
    loaded = load_config(FOLDER / f"{name}.toml").model_dump(mode="json")
    assert loaded["output_dir"] == f"runs/{name}"
    for section, keys in values.items():
        if isinstance(keys, dict):
            assert {key: loaded[section][key] for key in keys} == keys, section


def test_there_is_no_file_without_a_test() -> None:
    assert {path.stem for path in FOLDER.iterdir()} == {"laptop", "one-gpu", "sites"}


def test_the_laptops_file_has_the_defaults() -> None:
    assert load_config(FOLDER / "laptop.toml", ["output_dir=runs/first-light"]) == RunConfig()


def test_the_hub_and_the_site_in_the_comments_are_files_of_their_kind() -> None:
    text = (FOLDER / "sites.toml").read_text(encoding="utf-8")
    hub, site = re.findall(r"^# \w+\.toml, .*:\n#\n((?:#     .*\n)+)", text, re.M)
    for block, model in ((hub, Hub), (site, Site)):
        values = tomllib.loads(re.sub(r"^#     ", "", block, flags=re.M))
        refuse_unknown_keys(values, model, "comment")
        validated(model, values, "comment")
    config = load_config(FOLDER / "sites.toml")
    assert (
        len(Hub(**tomllib.loads(re.sub(r"^#     ", "", hub, flags=re.M))).site_names())
        == config.clients.num_clients
    )
