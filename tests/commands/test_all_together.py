"""What a user of an instruct model does, in one run.

Chats in a file for each client, training habits, packing, scores at the clients, an early stop, the best
round kept; killed on the way, resumed, exported and checked.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tests.json_lines import write_lines
from tests.tiny_models import character_tokenizer
from tests.tiny_runs import events, invoke, set_options, state_bytes

from fedflame.base.files import resolve_model
from fedflame.clients.answers import Answer, OnStep
from fedflame.clients.local import LocalClients

pytestmark = pytest.mark.slow

TEMPLATE = (
    "{% for m in messages %}{{ '[' + m.role + ']' + m.content + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)
HABITS = (
    "data.client_files=*.jsonl",
    "data.max_length=120",
    "clients.active_experts=4,2,1",
    "adapter.r=3",
    "adapter.use_rslora=true",
    "training.num_train_epochs=0.5",
    "training.per_device_train_batch_size=2",
    "training.gradient_accumulation_steps=2",
    "training.packing=true",
    "training.max_grad_norm=1",
    "training.warmup_ratio=0.2",
    "training.local_lr_scheduler_type=cosine",
    "server.num_server_rounds=6",
    "server.fraction_evaluate=1",
    "server.early_stopping_patience=2",
    "server.early_stopping_threshold=100",
    "server.load_best_model_at_end=true",
    "evaluation.client_test_size=0.2",
    "evaluation.rows_per_category=2",
    "evaluation.max_new_tokens=0",
    "evaluation.generate_every=0",
)


@pytest.fixture(params=["tiny", "embedded"])
def instruct(request: pytest.FixtureRequest, tiny_folder: Path, tmp_path: Path) -> Path:
    """A small model with a chat template of its own."""
    embedded = request.param == "embedded"
    folder = tmp_path / "instruct"
    shutil.copytree(resolve_model("olmoe-tiny") if embedded else tiny_folder, folder)
    if embedded:
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": TEMPLATE}))
    else:
        tokenizer = character_tokenizer()
        tokenizer.chat_template = TEMPLATE
        tokenizer.save_pretrained(folder)
    return folder


def turns(*contents: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(contents)]


@pytest.fixture
def silos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, count in (("east", 12), ("north", 30), ("west", 18)):
        rows = [
            {"messages": turns(f"{name} {n} plus 1?", f"It is {n + 1}.", "and 1?", f"{n + 2}")}
            for n in range(count)
        ]
        write_lines(Path(f"{name}.jsonl"), rows)


def options(model: Path, run: str = "") -> list[str]:
    sets = set_options(*HABITS)
    return ["--model", str(model), *sets, *(("--output-dir", run) if run else ())]


def killed_in_round_2(self: LocalClients, plan: bytes, on_step: OnStep) -> Answer:
    killed_in_round_2.asked += 1  # type: ignore[attr-defined]
    if killed_in_round_2.asked == 8:  # type: ignore[attr-defined] # three trained and three scored in round 1
        raise KeyboardInterrupt
    return ANSWER(self, plan, on_step)


ANSWER = LocalClients.answer


@pytest.mark.usefixtures("silos")
def test_a_run_with_the_habits_of_today(instruct: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = invoke("plan", *options(instruct), "--show-row")
    assert plan.exit_code == 0, plan.stderr
    marked = [line for line in plan.stdout.splitlines() if line.startswith("> ")]
    assert len(marked) == 2 and all("." in line or line[2:3].isdigit() for line in marked)

    whole = invoke("run", *options(instruct, "whole"))
    assert whole.exit_code == 0, whole.stderr
    killed_in_round_2.asked = 0  # type: ignore[attr-defined]
    with monkeypatch.context() as patch:
        patch.setattr(LocalClients, "answer", killed_in_round_2)
        assert invoke("run", *options(instruct, "killed")).exit_code == 130
    resumed = invoke("run", *options(instruct, "killed"), "--resume")
    assert resumed.exit_code == 0, resumed.stderr
    run = Path("killed")
    assert state_bytes(run) == state_bytes(Path("whole"))
    adapters = sorted(path.relative_to(run) for path in run.glob("adapter/**/*.safetensors"))
    assert adapters and all(
        (run / path).read_bytes() == (Path("whole") / path).read_bytes() for path in adapters
    )

    assert max(event["round"] for event in events(run, "round")) == 2, "100 nats better is nothing"
    told = events(run, "client_evaluation")
    assert {(event["round"], event["client"]) for event in told} >= {(2, 0), (2, 1), (2, 2)}
    report = (run / "report.html").read_text(encoding="utf-8")
    assert all(name in report for name in ("east", "north", "west"))
    checked = invoke("export", run, "--to", "exported", "--check")
    assert checked.exit_code == 0 and "checked at k = " in checked.output, checked.output
