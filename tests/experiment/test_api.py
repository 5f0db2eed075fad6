"""`import fedflame` in a program: runs, rows and methods that the program hands over, and what comes back."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from safetensors.torch import load_file
from tests.json_lines import write_lines
from tests.tiny_runs import ANSWERS, ONE_ROUND, SETTINGS, adapter_bytes, tiny_config

import fedflame
from fedflame.config.run_config import RunConfig
from fedflame.data.conversations import Conversation
from fedflame.data.skills import instructions
from fedflame.errors import UserError
from fedflame.messages import Adapter, ClientUpdate
from fedflame.strategies.base import ServerState
from fedflame.strategies.fedavg import FedAvg
from fedflame.training.scores import total

PROGRAM = """
from dataclasses import replace
import torch
from fedflame import run
from fedflame.messages import Adapter
from fedflame.strategies import FedAvg

class Median(FedAvg):
    def aggregate_train(self, state, updates):
        deltas = [update.delta.tensors() for update in updates]
        median = {n: torch.stack([d[n] for d in deltas]).median(0).values for n in deltas[0]}
        return replace(state, adapter=state.adapter.combine(Adapter.from_tensors(median), torch.add))

finished = run(%s, strategy=Median(active_experts=4, rank=3))
print(finished.scores)
""".strip()


class Sign(FedAvg):
    """Adds the sign of the clients' mean, so that the result can be told from every other method's."""

    def aggregate_train(self, state: ServerState, updates: Iterable[ClientUpdate]) -> ServerState:
        averaged = super().aggregate_train(state, updates)
        step = averaged.adapter.combine(state.adapter, lambda new, old: 1e-3 * torch.sign(new - old))
        return replace(state, adapter=state.adapter.combine(step, torch.add))


def config_of(model: Path, run: Path, *overrides: str) -> RunConfig:
    return tiny_config(model, run, ONE_ROUND, *overrides)


def rows_of(texts: Iterable[Conversation]) -> list[dict[str, str]]:
    return [{"instruction": t.turns[0].content, "output": t.response, "category": t.category} for t in texts]


ROWS = rows_of(instructions(60, 3, "train"))


@pytest.fixture(scope="module")
def first(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> fedflame.Run:
    return fedflame.run(tiny_config(tiny_folder, tmp_path_factory.mktemp("runs") / "first", ANSWERS))


def test_every_name_is_there_and_documented_and_costs_nothing_before_it_is_used() -> None:
    assert len(fedflame.__all__) == 12
    for name in fedflame.__all__:
        assert name == "__version__" or getattr(fedflame, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'runn'"):
        _ = fedflame.runn  # type: ignore[attr-defined]
    code = "import sys, fedflame; print(len([m for m in sys.modules if m.startswith('fedflame')]))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout == "1\n"


@pytest.mark.slow
def test_the_api_and_the_command_line_do_the_same(
    first: fedflame.Run, undisturbed: Callable[..., Path]
) -> None:
    assert adapter_bytes(first.folder) == adapter_bytes(undisturbed())


def test_a_method_in_the_programs_own_file_trains_in_fifteen_lines(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings: dict[str, Any] = {}
    for line in (*SETTINGS, f"model.model_name_or_path={tiny_folder}", f"output_dir={tmp_path / 'run'}"):
        key, _, value = line.partition("=")
        section, _, name = key.rpartition(".")
        (settings.setdefault(section, {}) if section else settings)[name] = value
    program = PROGRAM % json.dumps(settings)
    assert len(program.splitlines()) <= 15
    (tmp_path / "program.py").write_text(program)
    runpy.run_path(str(tmp_path / "program.py"), run_name="__main__")
    scores = eval(capsys.readouterr().out)  # what the program printed: a plain dict
    assert sorted(scores) == [0, 1, 2, 3] and scores[3][4]["loss"] < scores[0][4]["loss"]


@pytest.mark.slow
def test_a_path_a_dict_and_a_configuration_are_the_same_run(tiny_folder: Path, tmp_path: Path) -> None:
    config = config_of(tiny_folder, tmp_path / "one")
    values = json.loads(config.model_dump_json()) | {"output_dir": str(tmp_path / "two")}
    lines = [f'output_dir = "{tmp_path / "three"}"']
    for section, keys in values.items():
        if isinstance(keys, dict):
            lines += [f"[{section}]", *(f"{key} = {json.dumps(value)}" for key, value in keys.items())]
    (tmp_path / "run.toml").write_text("\n".join(lines))
    runs = [fedflame.run(given) for given in (config, values, tmp_path / "run.toml")]
    assert {run.folder.name for run in runs} == {"one", "two", "three"}
    assert len({adapter_bytes(run.folder) for run in runs}) == 1


def test_events_are_the_lines_of_the_metrics_as_they_happen(tiny_folder: Path, tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []
    lengths: list[int] = []
    path = tmp_path / "run" / "metrics.jsonl"

    def on_event(event: dict[str, Any]) -> None:
        seen.append(event)
        lengths.append(len(path.read_bytes().splitlines()))

    run = fedflame.run(config_of(tiny_folder, tmp_path / "run"), on_event=on_event)
    assert seen == run.metrics and {"client", "round", "evaluation"} <= {event["event"] for event in seen}
    assert lengths == list(range(1, len(seen) + 1)), "each is told once it is written"


def test_scores_adapters_and_rescalers_are_those_of_the_files(first: fedflame.Run) -> None:
    lines = [m for m in first.metrics if m["event"] == "evaluation" and m["category"] is None]
    assert len(lines) == 4 * 3
    for line in lines:
        assert first.scores[line["round"]][line["active_experts"]] == {
            name: line[name] for name in ("loss", "exact_match", "rouge_l")
        }
    assert first.report.is_file() and first.config.server.num_server_rounds == 3
    exported = load_file(first.adapter_folder / "adapter_model.safetensors")
    name = "model.layers.0.self_attn.k_proj"
    for k, folder in ((None, ""), (4, ""), (1, "k1")):
        exported = load_file(first.adapter_folder / folder / "adapter_model.safetensors")
        value = first.adapter(k).attention[f"{name}.B"]
        assert torch.equal(value, exported[f"base_model.model.{name}.lora_B.weight"]) and value.any()
    assert not torch.equal(first.adapter(4).attention[f"{name}.B"], first.adapter(1).attention[f"{name}.B"])
    rescalers = load_file(first.adapter_folder / "rescalers.safetensors")
    assert first.rescaler(1) == rescalers["k1"].tolist() != first.rescaler(4) == [1.0, 1.0]
    with pytest.raises(UserError, match="k = 3: the run has an adapter for k = 4, 2, 1"):
        first.adapter(3)
    with pytest.raises(UserError, match="k = 3: the run has a rescaler for k = 4, 2, 1"):
        first.rescaler(3)


@pytest.mark.parametrize("kind", ["list", "dataset", "file"])
def test_rows_in_memory_are_split_as_those_of_a_file(kind: str, tiny_folder: Path, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", ROWS)
    config = config_of(tiny_folder, tmp_path / "run", f"data.dataset_name={path}")
    data: Any = {"list": ROWS, "dataset": datasets.Dataset.from_list(ROWS), "file": None}[kind]
    run = fedflame.run(config, data=data)
    partition = json.loads((run.folder / "partition.json").read_text())
    of_the_file = fedflame.plan(config).clients
    assert [(c["rows"], c["per_category"]) for c in partition["clients"]] == [
        (c["rows"], c["per_category"]) for c in of_the_file
    ]
    assert run.config.data.dataset_name == ("in-memory" if data is not None else str(path))


@pytest.mark.parametrize("table", [False, True])
def test_rows_by_client_stay_with_their_client(table: bool, tiny_folder: Path, tmp_path: Path) -> None:
    parts: list[Any] = [ROWS[:30], ROWS[30:50]]
    data = [datasets.Dataset.from_list(part) for part in parts] if table else parts
    config = json.loads(config_of(tiny_folder, tmp_path / "run", "data.max_rows=0").model_dump_json())
    config["clients"] = {"active_experts": [4, 1]}
    run = fedflame.run(config, data=data)
    assert run.config.clients.num_clients == 2
    partition = json.loads((run.folder / "partition.json").read_text())
    assert (partition["partition"], partition["alpha"]) == ("given", None)
    assert "in-memory, given" in run.report.read_text(encoding="utf-8")
    held_out = partition["held_out_rows"]
    assert sum(client["rows"] for client in partition["clients"]) == 50 - held_out and held_out > 0
    for client, part in zip(partition["clients"], parts, strict=True):
        for category, rows in client["per_category"].items():
            assert rows <= sum(row["category"] == category for row in part)
    assert [e["num_examples"] for e in run.metrics if e["event"] == "client"] == [
        client["rows"] for client in partition["clients"]
    ]


def test_clients_that_the_configuration_does_not_speak_of_follow_the_rows(tiny_folder: Path) -> None:
    plan = fedflame.plan(None, data=[ROWS[:30], ROWS[30:]])
    assert [client["active_experts"] for client in plan.clients] == [8, 4]


def test_a_method_that_is_handed_over_makes_the_adapter(tiny_folder: Path, tmp_path: Path) -> None:
    config = config_of(tiny_folder, tmp_path / "sign")
    run = fedflame.run(config, strategy=Sign(active_experts=2))
    assert run.config.strategy.name == "custom"
    start = fedflame.run(config_of(tiny_folder, tmp_path / "none", "training.learning_rate=1e-12"))
    moved = run.adapter(2).combine(start.adapter(), torch.sub)
    steps = torch.cat([value.flatten() for value in moved.tensors().values()]).abs()
    assert bool((((steps - 1e-3).abs() < 1e-5) | (steps < 1e-5)).all()) and int((steps > 5e-4).sum()) > 100
    assert {m["active_experts"] for m in run.metrics if m["event"] == "client"} == {2}


@pytest.mark.slow
def test_a_run_with_a_method_of_its_own_goes_on_and_is_scored_and_exported(
    tiny_folder: Path, tmp_path: Path
) -> None:
    def interrupt(event: Mapping[str, Any]) -> None:
        if event["event"] == "round" and event["round"] == 2:
            raise KeyboardInterrupt

    whole = fedflame.run(tiny_config(tiny_folder, tmp_path / "whole"), strategy=Sign(2))
    config = tiny_config(tiny_folder, tmp_path / "cut")
    with pytest.raises(KeyboardInterrupt, match="goes on after round 1"):
        fedflame.run(config, strategy=Sign(2), on_event=interrupt)
    with pytest.raises(UserError, match=r"needs the configuration .* strategy\.name differs"):
        fedflame.run(config, resume=True)
    resumed = fedflame.run(config, strategy=Sign(2), resume=True)
    assert adapter_bytes(resumed.folder) == adapter_bytes(whole.folder)
    scores = fedflame.evaluate(resumed, active_experts=[2])
    assert scores[2]["arithmetic"].loss > 0
    assert total(scores[2]).loss == pytest.approx(resumed.scores[3][2]["loss"], rel=1e-6)
    exported = fedflame.export(resumed, tmp_path / "adapter")
    weights = "adapter_model.safetensors"
    assert (exported / weights).read_bytes() == (resumed.adapter_folder / weights).read_bytes()


def test_scores_of_a_run_on_rows_in_memory_need_the_rows_again(tiny_folder: Path, tmp_path: Path) -> None:
    run = fedflame.run(config_of(tiny_folder, tmp_path / "run"), data=ROWS)
    with pytest.raises(UserError, match="a program passed these rows in; it must do so again"):
        fedflame.evaluate(run)
    again = fedflame.evaluate(run, data=ROWS, active_experts=[4])
    assert total(again[4]).loss == pytest.approx(run.scores[1][4]["loss"], rel=1e-6)


@pytest.mark.parametrize(
    ("data", "wanted"),
    [
        (7, "data: got int; it must be a datasets.Dataset, a list of dicts, or a list with one of these"),
        ("rows.jsonl", "data: got str; it must be a datasets.Dataset"),
        ([], "data: got an empty list; it must be"),
        ([[]], r"data\[0\]: got an empty list; it must be a datasets.Dataset or a list of dicts"),
        ([ROWS, 3], r"data\[1\]: got int; it must be"),
        ([{"a": 1}], "data: no column recognised as instruction and response among 'a'"),
        ([{"instruction": "x", "output": None}], "data: no usable row .1 skipped; the first, data:row 1"),
        ([ROWS, [{"instruction": "x", "output": ""}]], r"data\[1\]: no usable row"),
        (
            [[{"instruction": text, "output": text}] for text in "ab"],
            "too few rows to hold some out for evaluation and leave each client one",
        ),
    ],
)
def test_rows_that_cannot_be_used_are_refused_in_one_line(data: Any, wanted: str) -> None:
    with pytest.raises(UserError, match=wanted) as refused:
        fedflame.plan(None, data=data)
    assert "\n" not in str(refused.value)


def test_what_contradicts_itself_is_refused_in_one_line(tiny_folder: Path, tmp_path: Path) -> None:
    config = {"clients": {"num_clients": 3}}
    with pytest.raises(UserError, match=r"clients\.num_clients = 3: data has the rows of 2 clients"):
        fedflame.plan(config, data=[ROWS, ROWS])
    with pytest.raises(UserError, match="resume and overwrite exclude each other"):
        fedflame.run(None, resume=True, overwrite=True)
    with pytest.raises(UserError, match="workers = 0: must be at least 1"):
        fedflame.run(None, workers=0)
    with pytest.raises(UserError, match=r"'custom': only a program can hand over such a method"):
        fedflame.run(config_of(tiny_folder, tmp_path / "run", "strategy.name=custom"))
    assert not (tmp_path / "run").exists()


def test_adapters_are_messages_with_banks_of_every_expert(first: fedflame.Run) -> None:
    adapter = first.adapter()
    assert isinstance(adapter, Adapter) and adapter.rank == 3
    assert {name.partition(".")[2] for name in adapter.experts} == {"A1", "B1", "A2", "B2"}
