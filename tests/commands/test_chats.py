"""Runs over conversations with an instruct model: what is said, kept, refused and exported."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from tests.folder_contents import contents
from tests.json_lines import write_lines
from tests.tiny_models import VOCABULARY, character_tokenizer
from tests.tiny_runs import ONE_ROUND, adapter_bytes, arguments, invoke, state_bytes, tiny_config, tiny_run
from transformers import AutoTokenizer

from fedflame.base.loading import load_base_model
from fedflame.errors import UserError
from fedflame.experiment.export import ExportOptions, export_run
from fedflame.experiment.prepare import prepare
from fedflame.experiment.run import run_experiment

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system please') }}{% endif %}"
    "{{ '[' + m.role + ']' + m.content + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)
OTHER = TEMPLATE.replace("'['", "'#['")


def turns(*contents: str, system: str = "") -> list[dict[str, str]]:
    roles = ("user", "assistant")
    said = [{"role": roles[number % 2], "content": text} for number, text in enumerate(contents)]
    return [{"role": "system", "content": system}] * bool(system) + said


ROWS = [{"messages": turns(f"{n} plus 1", str(n + 1), "and 1", str(n + 2)), "source": "x"} for n in range(30)]


@pytest.fixture
def instruct(tiny_folder: Path, tmp_path: Path) -> Path:
    """The tiny model with a chat template."""
    folder = tmp_path / "instruct"
    shutil.copytree(tiny_folder, folder)
    tokenizer = character_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "chats.jsonl", [*ROWS, {"messages": turns("1 plus 1", "2", system="Add")}])


def test_a_run_over_conversations_says_what_it_reads_and_keeps_it(
    instruct: Path, data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shown = tiny_run(instruct, run, f"data.dataset_name={data}", ONE_ROUND)
    said = f"{data}: columns read: 'messages'; ignored: 'source'"
    assert f"{said}\n" in shown
    assert "rows in the base model's own chat template\n" in shown
    assert f"skipped {data}:31: the chat template refuses it: no system please\n" in shown
    (skipped,) = [json.loads(line) for line in (run / "skipped.jsonl").read_text().splitlines()]
    assert skipped == {
        "where": f"{data}:31", "reason": "the chat template refuses it: no system please"
    }  # fmt: skip
    partition = json.loads((run / "partition.json").read_text())
    assert (partition["columns"], partition["skipped_rows"]) == ([said], 1)
    assert partition["rows"] + partition["held_out_rows"] == 30
    assert sum(client["rows"] for client in partition["clients"]) == partition["rows"]


def test_the_exports_say_which_prompt_was_trained(instruct: Path, data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (tmp_path / "other.jinja").write_text(OTHER)
    given = f"data.chat_template_path={tmp_path / 'other.jinja'}"
    tiny_run(instruct, run, f"data.dataset_name={data}", ONE_ROUND)
    card = (run / "adapter" / "README.md").read_text()
    assert "the base model's own chat template" in card
    assert "\n    '[user]{instruction}<end>[assistant]'\n" in card and "An answer ends with <end>." in card
    assert not (run / "adapter" / "chat_template.jinja").exists()
    tiny_run(instruct, tmp_path / "other", f"data.dataset_name={data}", ONE_ROUND, given)
    adapter = tmp_path / "other" / "adapter"
    assert "\n    '#[user]{instruction}<end>[assistant]'\n" in (adapter / "README.md").read_text()
    assert (adapter / "chat_template.jinja").read_text() == OTHER
    export_run(tmp_path / "other", tmp_path / "merged", ExportOptions(merge=True))
    merged = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert merged.chat_template == OTHER
    sent = merged.apply_chat_template(turns("{instruction}"), tokenize=False, add_generation_prompt=True)
    assert f"\n    {sent!r}\n" in (tmp_path / "merged" / "README.md").read_text()


def test_the_card_of_a_plain_run_gives_the_plain_form(undisturbed, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    card = (undisturbed() / "adapter" / "README.md").read_text()
    assert "\n    'Instruction: {instruction}\\nResponse:'\n" in card
    assert "`Input: ...`" in card


def test_a_run_goes_on_with_the_template_that_it_began_with_only(
    instruct: Path, data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    settings = (f"data.dataset_name={data}", "server.num_server_rounds=2")
    tiny_run(instruct, run, *settings)
    before = contents(run)
    tokenizer = character_tokenizer()
    tokenizer.chat_template = OTHER
    tokenizer.save_pretrained(instruct)
    with pytest.raises(UserError, match="--resume needs the chat template it was started with"):
        run_experiment(prepare(tiny_config(instruct, run, *settings), "resume"))
    after = contents(run)
    assert {**after, ".lock": b""} == {**before, ".lock": b""}


@pytest.mark.slow
def test_a_run_over_conversations_that_goes_on_ends_in_the_same_bytes(
    instruct: Path, data: Path, tmp_path: Path
) -> None:
    run, settings = tmp_path / "run", (f"data.dataset_name={data}", "server.num_server_rounds=2")
    tiny_run(instruct, run, *settings, "evaluation.max_new_tokens=2")
    before = adapter_bytes(run), state_bytes(run)
    config = tiny_config(instruct, run, *settings, "evaluation.max_new_tokens=2")
    run_experiment(prepare(config, "resume", resume_from=1))
    assert (adapter_bytes(run), state_bytes(run)) == before


def test_a_template_that_refuses_most_rows_stops_the_run_before_it_begins(
    instruct: Path, tmp_path: Path
) -> None:
    rows = [{"messages": turns(f"{n} plus 1", str(n), system="Add")} for n in range(20)]
    data = write_lines(tmp_path / "chats.jsonl", [*rows, *ROWS[:10]])
    result = invoke(*arguments(instruct, tmp_path / "run", f"data.dataset_name={data}"))
    assert (result.exit_code, result.stderr) == (
        2,
        f"fedflame: 20 of 30 rows cannot be used; the first, {data}:"
        f"{result.stderr.partition(f'{data}:')[2].partition(':')[0]}: the chat template refuses it: no "
        "system please; change the rows, or name another data.chat_template_path\n",
    )
    assert not (tmp_path / "run").exists()


def test_plan_shows_the_first_row_with_its_loss_and_no_control_characters(
    instruct: Path, tmp_path: Path
) -> None:
    hostile = [{"messages": turns(f"[bold]\x1b[2J{n}", "4[/bold]\n5", "and", "6")} for n in range(30)]
    data = write_lines(tmp_path / "chats.jsonl", hostile)
    command = [*arguments(instruct, tmp_path / "run", f"data.dataset_name={data}"), "--show-row"]
    del command[command.index("--output-dir") : command.index("--output-dir") + 2]
    shown = invoke("plan", *command[1:]).stdout
    assert "\x1b" not in shown
    lines = shown[shown.index("first row of client 0") :].splitlines()
    assert [line[0] for line in lines[1:]] == [" ", ">", ">", " ", ">"]
    assert lines[2:4] == ["> 4[/bold]\\n", "> 5<end>"]
    assert lines[4:] == ["  [user]and<end>[assistant]", "> 6<end>"]
    row = json.loads(invoke("plan", *command[1:], "--json").stdout)["first_row"]
    assert [part["has_loss"] for part in row] == [False, True, False, True]


def test_split_writes_conversations_that_a_run_reads_as_they_were(
    instruct: Path, data: Path, tmp_path: Path
) -> None:
    result = invoke(
        "split", "--data", data, "--set", "clients.num_clients=1", "--set", "clients.active_experts=1",
        "--set", "evaluation.rows_per_category=1", "--output-dir", tmp_path / "parts",
    )  # fmt: skip
    assert result.exit_code == 0 and "ignored: 'source'" in result.stdout
    lines = (tmp_path / "parts" / "client-0.jsonl").read_text().splitlines()
    originals = [row["messages"] for row in ROWS]
    assert all(
        json.loads(line)["messages"] in [*originals, turns("1 plus 1", "2", system="Add")] for line in lines
    )


@pytest.mark.slow
def test_prompts_that_do_not_fit_into_the_context_are_counted(tiny_folder: Path, tmp_path: Path) -> None:
    rows = [
        {"instruction": f"{n:02} " + "x" * (475 if n % 2 else 30), "response": "y", "category": "ab"[n % 2]}
        for n in range(30)
    ]
    data = write_lines(tmp_path / "rows.jsonl", rows)
    settings = (f"data.dataset_name={data}", ONE_ROUND, "evaluation.max_new_tokens=2")
    shown = tiny_run(tiny_folder, tmp_path / "run", *settings)
    assert "held-out prompts" not in shown
    shown = tiny_run(tiny_folder, tmp_path / "cut", *settings[:2], "evaluation.max_new_tokens=20")
    assert "held-out prompts that are cut: 1; with evaluation.max_new_tokens they are longer than" in shown
    assert json.loads((tmp_path / "cut" / "partition.json").read_text())["cut_prompts"] == 1


# Tokens beyond the model's


def with_tokenizer(tiny_folder: Path, folder: Path, **special: str) -> Path:
    shutil.copytree(tiny_folder, folder)
    tokenizer = character_tokenizer()
    tokenizer.add_special_tokens(special)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_a_padding_token_that_the_model_does_not_have_gives_way_to_the_end_token(
    tiny_folder: Path, tmp_path: Path
) -> None:
    folder = with_tokenizer(tiny_folder, tmp_path / "model", pad_token="[PAD]")
    assert AutoTokenizer.from_pretrained(folder).pad_token_id == VOCABULARY
    model, tokenizer = load_base_model(str(folder), "float32")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id < model.get_input_embeddings().weight.shape[0]
    tiny_run(folder, tmp_path / "run", ONE_ROUND, "evaluation.max_new_tokens=2")
    tiny_run(tiny_folder, tmp_path / "same", ONE_ROUND, "evaluation.max_new_tokens=2")
    one, other = (
        torch.frombuffer(
            bytearray((tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes()),
            dtype=torch.uint8,
        )
        for name in ("run", "same")
    )
    assert torch.equal(one, other), "padding is masked"


@pytest.mark.slow
def test_an_end_token_that_the_model_does_not_have_is_refused_in_a_line(
    tiny_folder: Path, tmp_path: Path
) -> None:
    folder = with_tokenizer(tiny_folder, tmp_path / "model", eos_token="[END]")
    for command in (
        arguments(folder, tmp_path / "run"),
        ["plan", "--model", str(folder), "--set", "clients.active_experts=4"],
    ):
        result = invoke(*command)
        assert (result.exit_code, result.stderr) == (
            2,
            f"fedflame: the tokenizer gives '[END]' the id {VOCABULARY}; the model has embeddings for the "
            f"ids 0 to {VOCABULARY - 1}: they do not belong together\n",
        )
