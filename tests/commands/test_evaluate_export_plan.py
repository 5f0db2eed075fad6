from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.held_out_losses import WITHOUT_ADAPTER, logged_losses, losses, scores
from tests.json_lines import write_lines
from tests.tiny_models import TOP_K
from tests.tiny_runs import ANSWERS, SETTINGS, adapter_bytes, invoke, set_options
from transformers import AutoModelForCausalLM

from fedflame.data.federation import SKILLS_ROWS

MODELS = Path(__file__).parents[2] / "configs" / "models"


@pytest.fixture(scope="module")
def finished(undisturbed: Callable[..., Path]) -> Path:
    return undisturbed("server.num_server_rounds=2", "training.learning_rate=0.02", ANSWERS)


@pytest.mark.slow
def test_evaluating_a_run_repeats_its_last_evaluation(finished: Path) -> None:
    assert losses(finished) == pytest.approx(logged_losses(finished, 2), rel=1e-6)


def test_evaluating_the_exported_adapter_gives_the_runs_losses(finished: Path, tiny_folder: Path) -> None:
    again = losses(finished / "adapter", *WITHOUT_ADAPTER)
    assert again == pytest.approx(logged_losses(finished, 2), rel=1e-6)


def test_evaluating_the_base_model_gives_the_losses_before_round_1(finished: Path, tiny_folder: Path) -> None:
    base = losses(tiny_folder, *set_options(*SETTINGS))
    assert base == pytest.approx(logged_losses(finished, 0), rel=1e-6)


def rows_file(path: Path, texts: list[str]) -> Path:
    return write_lines(path, [{"instruction": text, "output": text[::-1]} for text in texts])


def test_all_rows_of_a_file_of_the_users_own_are_scored(
    finished: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    """Of a run, of its adapter and of a base; the rows that they were trained on need not be there."""
    file = rows_file(tmp_path / "test.jsonl", [f"row {number}" for number in range(23)])
    for source in (finished, finished / "adapter", tiny_folder):
        found = scores(
            source, "--data", file, "--active-experts", "2", "--set", "evaluation.rows_per_category=1"
        )
        assert found[2]["all"]["rows"] == 23


@pytest.mark.slow
def test_rows_that_a_run_was_trained_on_are_not_scored_as_if_they_were_not(
    tiny_folder: Path, tmp_path: Path
) -> None:
    file = rows_file(tmp_path / "rows.jsonl", [f"row {number}" for number in range(40)])
    settings = set_options(*SETTINGS, "server.num_server_rounds=1")
    run = invoke(
        "run", *settings, "--model", tiny_folder, "--data", file, "--output-dir", tmp_path / "run",
        "--set", "evaluation.split=test",
    )  # fmt: skip
    assert run.exit_code == 0, run.stderr
    (tmp_path / "link.jsonl").symlink_to(file)
    for name in (file, tmp_path / "link.jsonl"):
        refused = invoke("evaluate", tmp_path / "run", "--data", name)
        assert refused.exit_code == 2
        assert refused.stderr == (
            f"fedflame: evaluation.dataset_name = {str(name)!r}: these rows are trained on; name others, or "
            "leave it out to score the rows that are held out of them\n"
        )
    adapter = invoke("evaluate", tmp_path / "run" / "adapter", "--set", f"data.dataset_name={file}", "--json")
    assert adapter.exit_code == 0
    assert adapter.stderr.startswith("warning: the adapter does not say which rows it was trained on; ")
    assert scores(tmp_path / "run", "--active-experts", "2")[2]["all"]["rows"] == 1


def test_a_run_chosen_by_validation_rows_is_scored_on_a_test_file(finished: Path, tmp_path: Path) -> None:
    file = rows_file(tmp_path / "test.jsonl", ["a", "b", "c"])
    given = ("--set", "evaluation.split=validation", "--active-experts", "1")
    assert scores(finished, "--data", file, *given)[1]["all"]["rows"] == 3


def test_evaluate_at_a_k_that_no_client_had(finished: Path) -> None:
    assert list(scores(finished, "--active-experts", "3")) == [3]


def test_evaluate_refuses_a_k_above_the_models(finished: Path) -> None:
    result = invoke("evaluate", finished, "--active-experts", "5")
    assert result.exit_code == 2
    assert result.stderr == (
        "fedflame: active_experts 5: must be between 1 and 4 (the model's num_experts_per_tok)\n"
    )


def test_export_writes_the_runs_adapter(finished: Path, tmp_path: Path) -> None:
    result = invoke("export", finished, "--to", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == adapter_bytes(finished)


def test_merged_export_is_a_stock_checkpoint_with_the_runs_loss(
    finished: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    result = invoke("export", finished, "--to", tmp_path / "merged", "--merge", "--active-experts", "1")
    assert result.exit_code == 0, result.stderr
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert stock.config.num_experts_per_tok == 1
    settings = set_options(*SETTINGS)
    one_tier = ("--set", "clients.active_experts=1")
    again = losses(tmp_path / "merged", *settings, *one_tier)[1]
    assert again == pytest.approx(logged_losses(finished, 2)[1], rel=1e-4)


def test_export_refuses_active_experts_without_merge(finished: Path, tmp_path: Path) -> None:
    result = invoke("export", finished, "--to", tmp_path / "out", "--active-experts", "1")
    assert (result.exit_code, (tmp_path / "out").exists()) == (2, False)


def test_report_is_written_anew(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "report.html").unlink()
    result = invoke("report", tmp_path / "run")
    assert result.exit_code == 0, result.stderr
    assert (tmp_path / "run" / "report.html").stat().st_size > 10_000


def test_report_of_a_folder_that_is_no_run(tmp_path: Path) -> None:
    result = invoke("report", tmp_path)
    assert result.exit_code == 2
    assert result.stderr == f"fedflame: {tmp_path}: not a run folder: config.json is missing\n"


@pytest.mark.slow
def test_plan_answers_for_a_model_that_is_only_a_config() -> None:
    settings = ("--set", "adapter.r=16", "--set", "strategy.k_rotation=none")
    settings += ("--sequence-length", "128", "--json")
    result = invoke("plan", "--model", MODELS / "OLMoE-1B-7B-0924", *settings)
    assert result.exit_code == 0, result.stderr
    plan = json.loads(result.stdout)
    gflop = {tier["active_experts"]: tier["forward_flops_per_token"] * 128 / 1e9 for tier in plan["tiers"]}
    # The slope is the paper's: (342.8 - 158.0) / 7 = 26.4 GFLOP per expert over 128 tokens.
    assert (gflop[8] - gflop[1]) / 7 == pytest.approx(26.4, abs=0.05)
    assert plan["adapter_parameters"] == 150_994_944 + 16 * 4 * 16 * (2048 + 2048)
    assert sum(client["rows"] for client in plan["clients"]) == SKILLS_ROWS


def test_plan_loads_no_weights(tiny_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bare"
    shutil.copytree(tiny_folder, folder)
    (folder / "model.safetensors").unlink()
    settings = set_options(*SETTINGS)
    result = invoke("plan", "--model", folder, *settings)
    assert result.exit_code == 0, result.stderr
    assert "training" in result.stdout


def test_plan_says_what_an_evaluation_at_the_clients_sends(tiny_folder: Path) -> None:
    settings = set_options(*SETTINGS, "server.fraction_evaluate=0.6")
    plan = json.loads(invoke("plan", "--model", tiny_folder, *settings, "--json").stdout)
    told = " ".join(invoke("plan", "--model", tiny_folder, *settings).stdout.split())
    assert (
        "evaluation at 2 clients: 4 times, once before training; each time at most "
        f"{2 * plan['adapter_bytes']:,} bytes down and 1,000 up"
    ) in told
    assert "evaluation at" not in invoke("plan", "--model", tiny_folder, *settings[:-2]).stdout


def test_plan_refuses_tiers_that_the_model_cannot_run() -> None:
    result = invoke(
        "plan", "--model", MODELS / "Mixtral-8x7B" / "config.json", "--set", "clients.active_experts=3"
    )
    assert result.exit_code == 2
    assert result.stderr == (
        "fedflame: active_experts 3: must be between 1 and 2 (the model's num_experts_per_tok)\n"
    )


def test_plan_matches_what_the_run_wrote(finished: Path, tiny_folder: Path) -> None:
    rounds = "server.num_server_rounds=2"
    settings = set_options(*SETTINGS, rounds)
    plan = json.loads(invoke("plan", "--model", tiny_folder, *settings, "--json").stdout)
    written = json.loads((finished / "plan.json").read_text())
    assert plan["tiers"] == written["tiers"]
    partition = json.loads((finished / "partition.json").read_text())["clients"]
    assert plan["clients"] == [partition[cost["client"]] | cost for cost in written["clients"]]
    assert max(tier["active_experts"] for tier in plan["tiers"]) == TOP_K


def test_merged_weights_are_finite(finished: Path, tmp_path: Path) -> None:
    invoke("export", finished, "--to", tmp_path / "merged", "--merge")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert all(bool(torch.isfinite(value).all()) for value in stock.state_dict().values())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("work", "command"),
    [
        ("plan.print_plan", ("plan",)),
        ("evaluate.print_scores", ("evaluate", "run")),
        ("export.print_export", ("export", "run", "--to", "out")),
    ],
)
def test_an_interrupt_is_one_line_and_exit_code_130(
    monkeypatch: pytest.MonkeyPatch, work: str, command: tuple[str, ...]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"fedflame.commands.{work}", interrupted)
    result = invoke(*command)
    assert (result.exit_code, result.stdout, result.stderr) == (130, "", "fedflame: interrupted\n")
