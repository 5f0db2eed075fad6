"""What the documents name exists, and the method that they sketch runs."""

from __future__ import annotations

import importlib
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny_models import EXPERTS, LAYERS, PAD, RANK, TOP_K, VOCABULARY, random_adapter, tiny_adapted
from torch import Tensor

import fedflame
from fedflame.client import fine_tune
from fedflame.config import valid_keys
from fedflame.data.batches import EncodedRow
from fedflame.messages import Adapter, ClientUpdate, RoundPlan, validate_update
from fedflame.strategies import FedAvg
from fedflame.strategies.base import ClientProfile, Strategy

ROOT = Path(__file__).parents[1]
SOURCE = Path(fedflame.__file__).parent
DOCUMENTS = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md"]
NEW_METHOD = ROOT / "docs" / "new-method.md"
FILE_ENDINGS = {"py", "md", "json", "jsonl", "toml", "html", "csv", "parquet", "gz", "css", "safetensors"}


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
        and name not in valid_keys()
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


def ranks(adapter: Adapter) -> Iterator[tuple[str, Tensor]]:
    """Every value as [ranks, rest], gate and up of A1 and of B1 apart."""
    for name, value in adapter.tensors().items():
        if name.endswith("A1"):
            yield from ((name, half.transpose(0, 1).flatten(1)) for half in value.chunk(2, dim=1))
        elif name.endswith("B1"):
            yield from ((name, half.movedim(2, 0).flatten(1)) for half in value.chunk(2, dim=1))
        elif name.startswith("attention"):
            yield name, value if name.endswith(".A") else value.T
        else:
            yield name, value.movedim(1 if name.endswith("A2") else 2, 0).flatten(1)


@pytest.mark.parametrize(("k", "kept"), [(TOP_K, RANK), (TOP_K // 2, RANK // 2), (1, 1)])
def test_the_sketch_cuts_ranks_and_a_client_trains_only_those(
    sketch: dict[str, Any], k: int, kept: int
) -> None:
    adapted = tiny_adapted()
    strategy: Strategy = sketch["TruncatedRanks"](TOP_K)
    state = strategy.initialize(random_adapter(adapted), (TOP_K, 2, 1), LAYERS)
    told = strategy.configure_train(state, ClientProfile(client=0, active_experts=k, num_examples=3))
    assert (told.active_experts, told.rescaler) == (TOP_K, "fixed")
    for (name, value), (_, cut) in zip(ranks(state.adapter), ranks(told.adapter), strict=True):
        assert torch.equal(cut[:kept], value[:kept]) and not cut[kept:].any(), name
    plan = RoundPlan(1, 0, 7, TOP_K, told.rescaler, told.rescaler_values, told.adapter, 0.01, 0.1, 3, 2)
    rows = [
        EncodedRow([(3 + 5 * n + i) % (VOCABULARY - 3) + 3 for i in range(12)], 2, False) for n in range(3)
    ]
    update = fine_tune(adapted, rows, plan, PAD)
    validate_update(update, plan)
    for name, delta in ranks(update.delta):
        assert delta[:kept].any() and not delta[kept:].any(), name


def test_the_sketch_averages_deltas_with_their_zeros_by_rows_as_by_hand(sketch: dict[str, Any]) -> None:
    strategy: Strategy = sketch["TruncatedRanks"](TOP_K)
    state = strategy.initialize(random_adapter(tiny_adapted()), (TOP_K, 2), LAYERS)
    updates = [an_update(0, state.adapter, 1.0, 10), an_update(1, state.adapter, 5.0, 30)]
    first_ranks = sketch["first_ranks"]
    cut = {name: first_ranks(name, value, 0.5) for name, value in updates[1].delta.tensors().items()}
    updates[1] = replace(updates[1], delta=Adapter.from_tensors(cut))
    new = strategy.aggregate_train(state, iter(updates)).adapter
    for (name, value), (_, mean) in zip(ranks(state.adapter), ranks(new), strict=True):
        half = len(value) // 2
        torch.testing.assert_close(mean[:half], value[:half] + (10 + 150) / 40, rtol=1e-6, atol=0, msg=name)
        torch.testing.assert_close(mean[half:], value[half:] + 10 / 40, rtol=1e-6, atol=1e-6, msg=name)


def test_the_sketch_with_all_clients_at_full_k_is_fedavg(sketch: dict[str, Any]) -> None:
    strategy, fedavg = sketch["TruncatedRanks"](TOP_K), FedAvg(TOP_K)
    state = fedavg.initialize(random_adapter(tiny_adapted()), (TOP_K,), LAYERS)
    client = ClientProfile(client=0, active_experts=TOP_K, num_examples=3)
    told = strategy.configure_train(state, client).adapter.tensors()
    assert all(torch.equal(told[name], value) for name, value in state.adapter.tensors().items())
    updates = [an_update(client, state.adapter, 1.0 + client, 10) for client in range(3)]
    new = strategy.aggregate_train(state, updates).adapter.tensors()
    wanted = fedavg.aggregate_train(state, updates).adapter.tensors()
    assert all(torch.equal(new[name], value) for name, value in wanted.items())


def an_update(client: int, like: Adapter, delta: float, num_examples: int) -> ClientUpdate:
    return ClientUpdate(
        round=1,
        client=client,
        active_experts=TOP_K,
        delta=like.combine(like, lambda value, _: torch.full_like(value, delta)),
        rescaler_values=torch.ones(LAYERS),
        counts=torch.ones(LAYERS, EXPERTS, dtype=torch.int64),
        tokens=8,
        num_examples=num_examples,
        steps=1,
        loss=1.0,
    )
