"""What the documents name exists, and the method that they sketch runs."""

from __future__ import annotations

import ast
import importlib
import re
from collections import defaultdict
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.random_rounds import LAYERS, RANK, K, an_adapter, updates_of
from typer.main import get_command

import fedflame
from fedflame.cli import app
from fedflame.config.load import load_config
from fedflame.config.methods import METHODS, Method
from fedflame.config.run_config import RunConfig
from fedflame.config.settings import keys_of
from fedflame.config.strategy_section import StrategyConfig
from fedflame.engines.hub import Hub
from fedflame.messages import ClientUpdate
from fedflame.strategies import FedAvg
from fedflame.strategies.base import ServerState, Strategy
from fedflame.trainer.site import Site

ROOT = Path(__file__).parents[1]
SOURCE = Path(fedflame.__file__).parent
DOCUMENTS = [
    *sorted((ROOT / "docs").glob("*.md")),
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")),
]
NEW_METHOD = ROOT / "docs" / "new-method.md"
ROLE_PAGES = ("hub-administrator.md", "site-administrator.md", "researcher.md")
FILE_ENDINGS = set("css csv gz html json jsonl key log md parquet py safetensors toml".split())


def modules() -> dict[str, list[str]]:
    """The modules by every name a document may use: `moe.rescaler`, `rescaler`, `fedflame.moe.rescaler`."""
    found = defaultdict(list)
    for path in SOURCE.rglob("*.py"):
        parts = (SOURCE.name, *path.relative_to(SOURCE).with_suffix("").parts)
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        for start in range(len(parts)):
            found[".".join(parts[start:])].append(".".join(parts))
    return found


MODULES = modules()


def paths(text: str) -> set[str]:
    return {path.rstrip(".") for path in re.findall(r"(?<![\w/.-])(?:src|tests)/[\w./-]*", text)}


def dotted_names(text: str) -> set[str]:
    """Code spans such as `moe.rescaler.rescale` or `rescaler.rescale()` that start with a module of ours."""
    spans = re.findall(
        r"`([A-Za-z_]\w*(?:\.\w+)+)(?:\(\))?`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    )
    return {
        name
        for name in spans
        if name.split(".")[0] in MODULES
        and name.rpartition(".")[2] not in FILE_ENDINGS
        and name not in {*keys_of(RunConfig), *keys_of(Hub), *keys_of(Site)}
    }


def exists(name: str) -> bool:
    """Whether a module of that name, or a name in one, is in the package; fields of a dataclass count."""
    parts = name.split(".")
    return any(
        _has(importlib.import_module(module), parts[length:])
        for length in range(1, len(parts) + 1)
        for module in MODULES.get(".".join(parts[:length]), [])
    )


def _has(value: Any, names: list[str]) -> bool:
    for name in names:
        if name in getattr(value, "__annotations__", {}):
            value = None
        elif hasattr(value, name):
            value = getattr(value, name)
        else:
            return False
    return True


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_path_in_a_document_exists(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    assert {path for path in paths(text) if not (ROOT / path).exists()} == set()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_name_in_a_document_exists(document: Path) -> None:
    assert {name for name in dotted_names(document.read_text(encoding="utf-8")) if not exists(name)} == set()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_key_in_a_document_exists(document: Path) -> None:
    keys = {*keys_of(RunConfig), *keys_of(Hub), *keys_of(Site)}
    sections = {key.partition(".")[0] for key in keys if "." in key}
    named = re.findall(r"`(\w+\.\w+)\b", document.read_text(encoding="utf-8"))
    known = {
        name for name in named if name in keys or name.rpartition(".")[2] in FILE_ENDINGS or exists(name)
    }
    assert {name for name in set(named) - known if name.partition(".")[0] in sections} == set()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_test_in_a_document_exists(document: Path) -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", document.read_text(encoding="utf-8"))
    missing = {
        f"{path}::{name}"
        for path, name in named
        if f"def {name}(" not in (ROOT / path).read_text(encoding="utf-8")
    }
    assert missing == set()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_relative_link_in_a_document_leads_somewhere(document: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)", document.read_text(encoding="utf-8"))
    local = {target for target in targets if "://" not in target}
    assert {target for target in local if not (document.parent / target).exists()} == set()


@pytest.mark.parametrize(
    "document", [ROOT / "README.md", ROOT / "docs" / "python-api.md"], ids=lambda path: path.name
)
def test_the_configuration_of_a_python_example_loads(document: Path) -> None:
    (block,) = re.findall(r"^```python\n(.*?)^```", document.read_text(encoding="utf-8"), re.M | re.S)
    calls = [node for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Call)]
    (config,) = [ast.literal_eval(node.args[0]) for node in calls if ast.unparse(node.func) == "run"]
    assert load_config(config).server.num_server_rounds == 3
    assert len(block.splitlines()) <= 15


def test_security_and_faults_name_a_test_in_every_row() -> None:
    text = (ROOT / "docs" / "federation.md").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.startswith("| ") and line.count(" | ") == 3]
    rows = [line for line in lines if not line.startswith(("| what dies", "| attack", "| ---"))]
    assert len(rows) > 20 and len(lines) == len(rows) + 4, "two tables of four columns"
    assert [row for row in rows if "`tests/" not in row] == []


@pytest.mark.parametrize("command", ["hub init", "hub check", "site init", "site check", "trainer", "split"])
def test_every_option_of_the_sites_commands_is_in_a_page(command: str) -> None:
    pages = "".join((ROOT / "docs" / name).read_text(encoding="utf-8") for name in ROLE_PAGES)
    found = get_command(app)
    for part in command.split():
        found = found.commands[part]  # type: ignore[attr-defined]
    names = [option.opts[0] for option in found.params if option.opts[0].startswith("--")]
    common = {"--debug", "--set", "--data", "--model", "--help"}
    assert f"fedflame {command}" in pages
    assert [name for name in names if name not in common and name not in pages] == []


def test_names_and_paths_are_found_and_checked() -> None:
    text = (
        "`moe.rescaler.rescale`, `rescaler.nothing()`, `data.alpha`, `plan.json`, `torch.nn`, `messages.py`, "
        "`messages.ClientUpdate.tokens`, `messages.ClientUpdate.nothing`\nsee src/fedflame/none.py."
    )
    names = dotted_names(text)
    assert {name: exists(name) for name in names} == {
        "moe.rescaler.rescale": True,
        "rescaler.nothing": False,
        "messages.ClientUpdate.tokens": True,
        "messages.ClientUpdate.nothing": False,
    }
    assert paths(text) == {"src/fedflame/none.py"}
    assert len(dotted_names((ROOT / "docs" / "method.md").read_text(encoding="utf-8"))) > 20


# The sketch of docs/new-method.md


@pytest.fixture(scope="module")
def sketch() -> dict[str, Any]:
    """The names of the code block, executed as it stands."""
    blocks = re.findall(r"^```python\n(.*?)^```", NEW_METHOD.read_text(encoding="utf-8"), re.M | re.S)
    assert len(blocks) == 1
    names: dict[str, Any] = {"__name__": "sketch"}
    exec(compile(blocks[0], str(NEW_METHOD), "exec"), names)
    return names


Round = tuple[ServerState, ServerState, list[ClientUpdate]]


def a_round(sketch: dict[str, Any], steps: tuple[int, ...]) -> Round:
    """The state before and after a round of the sketch, and its updates."""
    strategy: Strategy = sketch["FedNova"](K)
    state = strategy.initialize(an_adapter(torch.Generator().manual_seed(0)), (K,), LAYERS)
    updates = updates_of(1, [RANK] * len(steps))
    updates = [replace(update, steps=count) for update, count in zip(updates, steps, strict=True)]
    return state, strategy.aggregate_train(state, iter(updates)), updates


def test_the_sketch_averages_steps_and_goes_as_many_as_the_clients_took(sketch: dict[str, Any]) -> None:
    state, new, updates = a_round(sketch, (2, 7, 4))
    rows, steps = [u.num_examples for u in updates], [u.steps for u in updates]
    for name, value in state.adapter.tensors().items():
        per_step = [u.delta.tensors()[name].double().numpy() / u.steps for u in updates]
        mean = np.average(steps, weights=rows) * np.average(per_step, axis=0, weights=rows)
        np.testing.assert_allclose(
            new.adapter.tensors()[name], value.double().numpy() + mean, rtol=0, atol=2e-6
        )


def test_the_sketch_with_equal_steps_is_fedavg(sketch: dict[str, Any]) -> None:
    state, new, updates = a_round(sketch, (5, 5, 5))
    for name, value in FedAvg(K).aggregate_train(state, updates).adapter.tensors().items():
        torch.testing.assert_close(new.adapter.tensors()[name], value, rtol=0, atol=1e-6)
    moved = new.adapter.combine(state.adapter, torch.sub).tensors()
    assert all(value.abs().max() > 0.01 for value in moved.values())


def test_the_row_of_the_sketch_names_options_that_there_are(sketch: dict[str, Any]) -> None:
    (block,) = re.findall(r"^```py\n(.*?)^```", NEW_METHOD.read_text(encoding="utf-8"), re.M | re.S)
    ((name, row),) = eval(f"{{{block}}}", {"Method": Method}).items()
    assert row.strategy == f"fedflame.strategies.{name}:FedNova" and name not in METHODS
    assert row.options == {*StrategyConfig.model_fields} & {
        field.name for field in fields(sketch["FedNova"])
    } - {"counted_rows", "robust"}


def test_the_sketch_without_updates_changes_nothing(sketch: dict[str, Any]) -> None:
    state, new, _ = a_round(sketch, ())
    assert new is state
