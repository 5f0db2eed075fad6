"""Every mistake a user can make: one line that says what was got and what is allowed, exit code 2."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path

import pytest
from tests.tiny_models import VOCABULARY, character_tokenizer
from tests.tiny_runs import SETTINGS, arguments, invoke, set_options
from transformers import LlamaConfig, LlamaForCausalLM

from fedflame.cost import refused_families
from fedflame.cost.refused_families import NOT_PACKABLE


def refuse(model: Path, run: Path, *overrides: str) -> str:
    """The one line that a refused run prints; nothing may have been written."""
    result = invoke(*arguments(model, run, *overrides))
    assert result.exit_code == 2, result.output
    assert not run.exists()
    line = result.stderr.removesuffix("\n")
    assert line.startswith("fedflame: ")
    assert "\n" not in line
    return line.removeprefix("fedflame: ")


def write_rows(path: Path, *lines: str) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def row(number: int) -> str:
    return json.dumps(
        {"instruction": f"say {number}", "response": str(number), "category": "abc"[number % 3]}
    )


@pytest.mark.parametrize("key", ["packing", "padding_free"])
def test_a_family_whose_rows_cannot_share_a_sequence(
    key: str, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(NOT_PACKABLE, "olmoe", "of a reason")
    expected = (
        "olmoe cannot be trained with training.packing or training.padding_free: of a reason; "
        "leave both false"
    )
    setting = f"training.{key}=true"
    assert refuse(tiny_folder, tmp_path / "run", setting) == expected
    planned = invoke("plan", "--model", tiny_folder, "--set", "clients.active_experts=4", "--set", setting)
    assert (planned.exit_code, planned.stderr) == (2, f"fedflame: {expected}\n")


def test_missing_data_file(tiny_folder: Path, tmp_path: Path) -> None:
    line = refuse(tiny_folder, tmp_path / "run", "data.dataset_name=/no/such/rows.jsonl")
    assert "/no/such/rows.jsonl" in line
    assert "no such file" in line


def test_unreadable_data_file(tiny_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(row(1).encode())[:-9])
    assert "rows.jsonl.gz" in refuse(tiny_folder, tmp_path / "run", f"data.dataset_name={path}")


def test_broken_and_empty_rows_are_named_counted_and_skipped(tiny_folder: Path, tmp_path: Path) -> None:
    good = [row(number) for number in range(30)]
    path = write_rows(
        tmp_path / "rows.jsonl", "{broken", *good, json.dumps({"instruction": "", "response": "x"})
    )
    run = tmp_path / "run"
    settings = (f"data.dataset_name={path}", "data.max_rows=0", "server.num_server_rounds=1")
    result = invoke(*arguments(tiny_folder, run, *settings))
    assert result.exit_code == 0, result.stderr
    shown = result.stdout.replace("\n", "")
    assert "rows.jsonl:1:" in shown
    assert "rows.jsonl:32:" in shown
    assert "2 rows skipped" in shown
    skipped = [json.loads(line) for line in (run / "skipped.jsonl").read_text().splitlines()]
    assert [Path(row["where"]).name for row in skipped] == ["rows.jsonl:1", "rows.jsonl:32"]
    partition = json.loads((run / "partition.json").read_text())
    assert partition["skipped_rows"] == 2
    assert partition["rows"] + partition["held_out_rows"] == 30


def test_no_usable_row(tiny_folder: Path, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", "{broken", '{"instruction": "", "response": ""}')
    line = refuse(tiny_folder, tmp_path / "run", f"data.dataset_name={path}")
    assert "no usable row (2 skipped" in line


def test_more_clients_than_rows(tiny_folder: Path, tmp_path: Path) -> None:
    line = refuse(tiny_folder, tmp_path / "run", "clients.num_clients=49")
    assert line == "clients.num_clients = 49: the data has 48 rows, and every client needs at least one"


def test_unknown_key_names_the_nearest(tiny_folder: Path, tmp_path: Path) -> None:
    line = refuse(tiny_folder, tmp_path / "run", "training.learning_rat=0.1")
    assert line == (
        "config: unknown key 'training.learning_rat'; the nearest valid key is 'training.learning_rate'"
    )


def test_unknown_key_in_the_file(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "config.toml", "[strategy]", "temprature = 2")
    result = invoke("run", path, "--output-dir", tmp_path / "run")
    assert result.exit_code == 2
    assert result.stderr == (
        "fedflame: config: unknown key 'strategy.temprature'; "
        "the nearest valid key is 'strategy.temperature'\n"
    )


def test_wrong_type(tiny_folder: Path, tmp_path: Path) -> None:
    line = refuse(tiny_folder, tmp_path / "run", "training.max_steps=many")
    assert line.startswith("config: training.max_steps = 'many': ")
    assert "integer" in line


@pytest.mark.parametrize("tiers", ["0", "4,0,1", "-1", "four"])
def test_active_experts_below_one(tiers: str, tiny_folder: Path, tmp_path: Path) -> None:
    line = refuse(tiny_folder, tmp_path / "run", f"clients.active_experts={tiers}")
    assert line.startswith(f"config: clients.active_experts = {tiers!r}: ")
    assert 'integers of at least 1, such as [8, 4, 2, 1] or "8,4,2,1"' in line


def test_active_experts_above_the_models(tiny_folder: Path, tmp_path: Path) -> None:
    line = refuse(tiny_folder, tmp_path / "run", "clients.active_experts=5,1")
    assert line == "active_experts 5: must be between 1 and 4 (the model's num_experts_per_tok)"


def test_fedavg_with_more_experts_than_the_models(tiny_folder: Path, tmp_path: Path) -> None:
    line = refuse(tiny_folder, tmp_path / "run", "strategy.name=fedavg", "strategy.active_experts=5")
    assert line.startswith("strategy.active_experts 5: must be 'min', 'full' or between 1 and 4")


def test_more_tiers_than_clients(tiny_folder: Path, tmp_path: Path) -> None:
    line = refuse(tiny_folder, tmp_path / "run", "clients.active_experts=4,4,2,1")
    assert line.startswith("config: clients.active_experts has 4 entries for clients.num_clients = 3")


def test_a_quorum_that_no_round_can_reach(tiny_folder: Path, tmp_path: Path) -> None:
    line = refuse(tiny_folder, tmp_path / "run", "server.min_clients=3", "server.fraction_train=0.5")
    assert line.startswith("config: server.min_clients = 3: server.fraction_train = 0.5 samples only 2 of 3")


def test_rows_longer_than_the_models_context(tiny_folder: Path, tmp_path: Path) -> None:
    line = refuse(tiny_folder, tmp_path / "run", "data.max_length=513")
    assert line.startswith("data.max_length = 513: the model's context is 512 tokens")


def test_a_family_whose_routers_have_no_load_balancing_loss(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refused_families, "BALANCED", frozenset())
    line = refuse(tiny_folder, tmp_path / "run", "training.router_aux_loss_coef=0.01")
    assert line == (
        "olmoe cannot be trained with training.router_aux_loss_coef: transformers has no load-balancing loss "
        "for its routers; leave it 0"
    )
    run = arguments(tiny_folder, tmp_path / "run", "training.router_aux_loss_coef=0.01")
    planned = invoke("plan", *run[1:3], *run[5:])
    assert (planned.exit_code, planned.stderr) == (2, f"fedflame: {line}\n")


@pytest.mark.parametrize(
    ("setting", "allowed"),
    [
        ("adapter.lora_dropout=1", "less than or equal to 0.99"),
        ("adapter.lora_dropout=-0.1", "greater than or equal to 0"),
        ("adapter.lora_dropout=nan", "finite number"),
        ("training.router_aux_loss_coef=-1", "greater than or equal to 0"),
        ("adapter.use_rslora=3", "valid boolean"),
    ],
)
def test_a_training_habit_out_of_its_range(
    setting: str, allowed: str, tiny_folder: Path, tmp_path: Path
) -> None:
    line = refuse(tiny_folder, tmp_path / "run", setting)
    assert line.startswith(f"config: {setting.partition('=')[0]} = ")
    assert allowed in line


def test_rank_zero(tiny_folder: Path, tmp_path: Path) -> None:
    assert refuse(tiny_folder, tmp_path / "run", "adapter.r=0").startswith("config: adapter.r = '0': ")


def test_target_module_that_the_model_lacks(tiny_folder: Path, tmp_path: Path) -> None:
    line = refuse(tiny_folder, tmp_path / "run", "adapter.target_modules=query")
    assert "query" in line


def test_dense_model(tmp_path: Path) -> None:
    folder = tmp_path / "dense"
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=24,
        intermediate_size=20,
        num_hidden_layers=1,
        num_attention_heads=4,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)
    assert "is no sparse mixture of experts" in refuse(folder, tmp_path / "run")


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", "tokenizer.json"])
def test_incomplete_model_folder(missing: str, tiny_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    (folder / missing).unlink()
    line = refuse(folder, tmp_path / "run")
    assert line.startswith(f"model {folder}: the folder has no ")


def test_model_on_the_hub_without_network(tmp_path: Path) -> None:
    line = refuse(Path("someone/some-moe"), tmp_path / "run")
    assert line.startswith("model 'someone/some-moe': no such folder, and not loadable from the hub")


def test_data_on_the_hub_without_network(tiny_folder: Path, tmp_path: Path) -> None:
    line = refuse(tiny_folder, tmp_path / "run", "data.dataset_name=someone/some-rows")
    assert "someone/some-rows" in line


def test_an_output_dir_that_is_a_file_is_left_alone(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("mine")
    result = invoke(*arguments(tiny_folder, tmp_path / "notes"))
    assert result.exit_code == 2
    assert (tmp_path / "notes").read_text() == "mine"


def test_resume_and_overwrite_exclude_each_other(tiny_folder: Path, tmp_path: Path) -> None:
    result = invoke(*arguments(tiny_folder, tmp_path / "run"), "--resume", "--overwrite")
    assert result.exit_code == 2
    assert result.stderr == "fedflame: --resume and --overwrite exclude each other; give one\n"


def test_debug_gives_the_traceback(tmp_path: Path) -> None:
    result = invoke("run", tmp_path / "missing.toml", "--debug")
    assert result.exit_code == 1
    assert "missing.toml" in str(result.exception)


def test_settings_of_the_tests_are_valid_keys() -> None:
    result = invoke("plan", *set_options(*SETTINGS), "--model", "/none")
    assert result.stderr == (
        "fedflame: model '/none': no such folder; use 'olmoe-tiny', a folder, or a hub id\n"
    )
