"""docs/configuration.md is what the code says."""

from __future__ import annotations

import re
import tomllib

import pytest

import make_configuration
from fedflame.config.load import load_config
from fedflame.config.run_config import RunConfig
from fedflame.config.settings import keys_of
from fedflame.engines.hub import Hub
from fedflame.trainer.site import Site

TEXT = make_configuration.PAGE.read_text(encoding="utf-8")
PARTS = dict(zip(("run", "site", "hub"), re.split(r"^## ", TEXT, flags=re.M)[1:], strict=True))


def test_the_page_is_up_to_date() -> None:
    assert make_configuration.page() == TEXT, "run python docs/make_configuration.py"


@pytest.mark.parametrize(
    ("part", "keys"), [("run", keys_of(RunConfig)), ("site", keys_of(Site)), ("hub", keys_of(Hub))]
)
def test_every_key_is_on_the_page_once_with_its_meaning(part: str, keys: list[str]) -> None:
    entries = re.findall(r"^- \*\*`(.+?)`\*\*: .+\.\n\n  \S", PARTS[part], re.M)
    assert sorted(entries) == sorted(keys)


def test_the_defaults_on_the_page_are_those_of_a_run() -> None:
    defaults = re.findall(r"^- \*\*`(.+?)`\*\*: .+; default `(.+)`\.$", PARTS["run"], re.M)
    assert load_config(tomllib.loads("\n".join(f"{key} = {value}" for key, value in defaults))) == RunConfig()


@pytest.mark.parametrize(
    "line",
    [
        '**`training.budget`**: one of `steps`, `compute`; default `"steps"`.',
        '**`model.dtype`**: one of `auto`, `float32`, `bfloat16`, `float16`; default `"auto"`.',
        "**`strategy.temperature`**: number, at least 0 and at most 8; default `1.0`.",
        '**`strategy.rank`**: `min`, `full` or an integer of at least 1; default `"full"`.',
        "**`clients.active_experts`**: list of integers; default `[8, 4, 2, 1]`.",
        "**`seed`**: integer, at least 0 and less than 2^63; default `0`.",
        '**`models`**: table of texts; default `{ "olmoe-tiny" = "olmoe-tiny" }`.',
        "**`trainer.active_experts`**: integer, at least 1; needed.",
    ],
)
def test_types_and_limits_are_in_words(line: str) -> None:
    assert line in TEXT
