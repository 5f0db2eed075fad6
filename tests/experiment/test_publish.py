"""A push to a hub on loopback, and the dry run without one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from tests.fake_hub import MAY_WRITE, fake_hub
from tests.folder_contents import contents
from tests.tiny_runs import invoke
from transformers import AutoModelForCausalLM
from typer.testing import Result

from fedflame.report.records import read_run
from fedflame.run_files.task_scores import Metric, ScoresAtK, TaskScores, write_task_scores

DRY_RUN = ("export", "--hub-model-id", "alice/tiny", "--license", "mit")


@pytest.fixture(scope="module")
def finished(undisturbed: Callable[..., Path]) -> Path:
    return undisturbed("server.num_server_rounds=1", "strategy.rescaler=none")


def pushed(patch: pytest.MonkeyPatch, address: str, token: str, run: Path, to: Path, *options: str) -> Result:
    """An export that is pushed to this hub with this token."""
    patch.setattr("huggingface_hub.constants.ENDPOINT", address)
    patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    patch.setenv("HF_TOKEN", token)
    return invoke(*DRY_RUN, run, "--to", to, "--push-to-hub", "--hub-private-repo", *options)


@pytest.mark.slow
def test_what_is_pushed_is_what_a_dry_run_writes_and_a_refusal_keeps_the_folder(
    finished: Path, tmp_path: Path
) -> None:
    result = invoke(*DRY_RUN, finished, "--to", tmp_path / "dry")
    assert result.exit_code == 0, result.stderr
    dry = contents(tmp_path / "dry")
    assert "adapter_model.safetensors" in dry and "k2/adapter_config.json" in dry
    with pytest.MonkeyPatch.context() as patch, fake_hub(tmp_path / "hub") as hub:
        done = pushed(patch, hub.address, MAY_WRITE, finished, tmp_path / "done")
        refusals = {
            "hf_unknown": (hub.address, "the hub does not accept the token (HF_TOKEN, or that of"),
            "hf_reads": (hub.address, "the token may not write there"),
            "hf_anything": ("http://127.0.0.1:9", ""),
        }
        refused = {
            token: pushed(patch, address, token, finished, tmp_path / token)
            for token, (address, _) in refusals.items()
        }
    assert done.exit_code == 0, done.stderr
    assert f"pushed: {hub.address}/alice/tiny\n" in done.stdout and MAY_WRITE not in done.stdout
    assert [made["visibility"] for made in hub.created] == ["private"]
    assert contents(tmp_path / "hub" / "alice" / "tiny") == dry
    for token, result in refused.items():
        folder, error = tmp_path / token, result.stderr
        assert result.exit_code == 2 and error.count("\n") == 1, error
        reason = refusals[token][1]
        assert error.startswith(f"fedflame: {folder} is written, but not pushed to alice/tiny: {reason}")
        assert error.endswith(f"; `hf upload alice/tiny {folder}` tries again\n")
        assert contents(folder) == dry


@pytest.mark.slow
def test_what_the_hub_says_of_a_card_is_passed_on(finished: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch, fake_hub(tmp_path / "hub") as hub:
        licence = ("--license", "nonsense")
        result = pushed(patch, hub.address, MAY_WRITE, finished, tmp_path / "out", *licence)
    said = 'Invalid metadata in README.md. - "license" must be one of ours; `hf upload'
    assert result.exit_code == 2 and said in result.stderr and result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (("--push-to-hub",), "--push-to-hub needs --hub-model-id USER/NAME"),
        (("--hub-model-id", "tiny"), "--hub-model-id 'tiny': must be USER/NAME or ORGANISATION/NAME"),
        (("--hub-model-id", "a/b/c"), "--hub-model-id 'a/b/c': Repo id must be in the form"),
        (("--hub-model-id", "a/b--c"), "--hub-model-id 'a/b--c': Cannot have -- or .. in repo_id"),
        (("--push-to-hub", "--hub-model-id", "a/b"), "--push-to-hub: HF_HUB_OFFLINE is set"),
        (("--license", "other"), "--license other needs --license-name"),
        (("--merge", "--gguf"), "--merge and --gguf exclude each other; give one"),
        (("--gguf", "--check"), "--check loads with transformers, which does not read a GGUF LoRA"),
        (("--gguf", "--layout", "fused"), "--layout is of an adapter for PEFT"),
    ],
)
def test_what_cannot_be_exported_is_one_line_before_anything_is_written(
    options: tuple[str, ...], line: str, finished: Path, tmp_path: Path
) -> None:
    result = invoke("export", finished, "--to", tmp_path / "out", *options)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith(f"fedflame: {line}") and result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_without_a_token_nothing_is_written(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.is_offline_mode", lambda: False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    options = ("--push-to-hub", "--hub-model-id", "a/b")
    result = invoke("export", finished, "--to", tmp_path / "out", *options)
    assert result.exit_code == 2 and not (tmp_path / "out").exists()
    assert result.stderr == (
        "fedflame: --push-to-hub: no token; set HF_TOKEN to one with write access, or `hf auth login`\n"
    )


@pytest.mark.parametrize("options", [(), ("--merge", "--active-experts", "1")])
def test_the_snippet_of_the_card_loads_what_was_trained(
    options: tuple[str, ...],
    finished: Path,
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "alice" / "tiny"  # from_pretrained takes such a folder before it asks the hub
    result = invoke("export", finished, "--to", folder, "--hub-model-id", "alice/tiny", *options)
    assert result.exit_code == 0, result.stderr
    text = (folder / "README.md").read_text()
    [snippet] = [part.partition("```")[0] for part in text.split("```python\n")[1:]]
    assert '"alice/tiny"' in snippet
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(snippet, names)
    base = AutoModelForCausalLM.from_pretrained(tiny_folder)
    base.config.num_experts_per_tok = 1 if options else 4
    tokens = torch.arange(3, 40).unsqueeze(0)
    with torch.no_grad():
        before, after = base(tokens).logits, names["model"](tokens).logits
    assert float((after - before).abs().max()) > 1e-3


def task_scores(at: int) -> TaskScores:
    metrics = [Metric(task="hellaswag", name="acc_norm", value=0.5, stderr=0.01)]
    costs = {"prompt_tokens_per_second": 100.0, "new_tokens_per_second": 10.0, "peak_memory": None}
    by_k = [ScoresAtK(active_experts=k, metrics=metrics, **costs) for k in (4, 1)]  # type: ignore[arg-type]
    return TaskScores(
        round=at, lm_eval="0.4.13", num_fewshot=5, limit=None, apply_chat_template=False, device="a CPU",
        dtype="float32", by_k=by_k,
    )  # fmt: skip


def copied(run: Path, to: Path) -> Path:
    """The files of a run that an export reads."""
    for path in (*run.glob("*.json"), run / "metrics.jsonl", *run.glob("checkpoint/*")):
        target = to / path.relative_to(run)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    return to


def test_the_card_has_scores_by_k_licence_and_base_in_the_form_of_the_hub(
    finished: Path, tmp_path: Path
) -> None:
    run = copied(finished, tmp_path / "run")
    write_task_scores(run, task_scores(1))
    licence = (
        "--license",
        "other",
        "--license-name",
        "ours",
        "--license-link",
        "https://example.org/licence",
    )
    result = invoke("export", run, "--to", tmp_path / "out", "--hub-model-id", "alice/tiny", *licence)
    assert result.exit_code == 0, result.stderr
    card = ModelCard.load(tmp_path / "out" / "README.md")
    data = card.data.to_dict()
    assert {key: data.get(key) for key in ("license", "license_name", "license_link", "library_name")} == {
        "license": "other",
        "license_name": "ours",
        "license_link": "https://example.org/licence",
        "library_name": "peft",
    }
    assert data.keys().isdisjoint(
        {"base_model", "base_model_relation", "datasets"}
    )  # folders and skills are nowhere on the hub
    results = {(r.dataset_type, r.metric_type, r.metric_name): r.metric_value for r in card.data.eval_results}
    last = {e.active_experts: e.loss for e in read_run(run).evaluations if (e.round, e.category) == (1, None)}
    for k, loss in last.items():
        assert results["held-out-rows", "loss", f"nats per response token, k = {k}"] == loss
    assert results["hellaswag", "acc_norm", "acc_norm, k = 4"] == 0.5
    assert "| 1 | hellaswag | acc_norm | 0.5000 | 0.0100 |" in card.content
    assert "\n# LoRA adapter for tiny, trained with fedflame\n" in card.content


def test_a_merged_checkpoint_has_the_scores_of_its_k_alone(finished: Path, tmp_path: Path) -> None:
    run = copied(finished, tmp_path / "run")
    write_task_scores(run, task_scores(1))
    result = invoke("export", run, "--to", tmp_path / "out", "--merge", "--active-experts", "1")
    assert result.exit_code == 0, result.stderr
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert {result.metric_name.rpartition(", ")[2] for result in card.data.eval_results} == {"k = 1"}
    assert "| 4 |" not in card.content


def test_scores_of_another_round_are_not_of_this_adapter(finished: Path, tmp_path: Path) -> None:
    run = copied(finished, tmp_path / "run")
    write_task_scores(run, task_scores(0))
    invoke("export", run, "--to", tmp_path / "out")
    assert "hellaswag" not in (tmp_path / "out" / "README.md").read_text()


def test_a_gguf_lora_of_a_run_is_written_with_its_command(finished: Path, tmp_path: Path) -> None:
    result = invoke("export", finished, "--to", tmp_path / "out", "--gguf", "--active-experts", "2")
    assert result.exit_code == 0, result.stderr
    assert "--override-kv olmoe.expert_used_count=int:2" in result.stdout
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.library_name == "gguf" and (tmp_path / "out" / "adapter.gguf").stat().st_size > 1000
