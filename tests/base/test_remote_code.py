"""A model folder's code never runs and nothing is asked: one line says what to do."""

from __future__ import annotations

import ast
import json
import shutil
from pathlib import Path

import pytest
from tests.tiny_runs import arguments, invoke

import fedflame
from fedflame.base.tokenizer import read_tokenizer
from fedflame.errors import UserError

SOURCE = Path(fedflame.__file__).parent
LOADS = {"from_pretrained", "from_config"}


@pytest.fixture
def stranger(tiny_folder: Path, tmp_path: Path) -> Path:
    """A model of a family of its own, whose code leaves a mark."""
    folder, mark = tmp_path / "stranger", tmp_path / "mark"
    shutil.copytree(tiny_folder, folder)
    leave_mark = f"open({str(mark)!r}, 'w').close()\n"
    (folder / "mine.py").write_text(
        f"{leave_mark}from transformers import OlmoeConfig, OlmoeForCausalLM, PreTrainedTokenizerFast\n"
        "class MyConfig(OlmoeConfig):\n    model_type = 'mine'\n"
        "class MyModel(OlmoeForCausalLM):\n    config_class = MyConfig\n"
        "class MyTokenizer(PreTrainedTokenizerFast):\n    pass\n"
    )
    classes = {"AutoConfig": "mine.MyConfig", "AutoModelForCausalLM": "mine.MyModel"}
    edit(folder / "config.json", model_type="mine", architectures=["MyModel"], auto_map=classes)
    auto_map = {"AutoTokenizer": ["mine.MyTokenizer", "mine.MyTokenizer"]}
    edit(folder / "tokenizer_config.json", tokenizer_class="MyTokenizer", auto_map=auto_map)
    return folder


def edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.fixture
def nobody_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks"))


@pytest.mark.parametrize("command", ["run", "evaluate"])
def test_no_code_of_a_model_runs(
    command: str, stranger: Path, tmp_path: Path, nobody_answers: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    run = tmp_path / "run"
    given = arguments(stranger, run) if command == "run" else ["evaluate", str(stranger)]
    result = invoke(*given)
    assert result.exit_code == 2
    assert result.stderr == (
        f"fedflame: model {stranger}: cannot be loaded without running Python code of the model itself "
        "(auto_map), which fedflame never does; take a model of a family that transformers knows\n"
    )
    assert not (tmp_path / "mark").exists() and not run.exists()


@pytest.mark.slow
def test_code_beside_a_family_that_transformers_knows_is_left_alone(
    stranger: Path, tmp_path: Path, nobody_answers: None
) -> None:
    edit(stranger / "config.json", model_type="olmoe", architectures=["OlmoeForCausalLM"])
    edit(stranger / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    result = invoke(*arguments(stranger, tmp_path / "run", "server.num_server_rounds=1"))
    assert result.exit_code == 0, result.stderr
    assert invoke("plan", "--model", stranger, "--set", "clients.active_experts=4,1").exit_code == 0
    assert invoke("export", tmp_path / "run", "--to", tmp_path / "out").exit_code == 0
    assert not (tmp_path / "mark").exists()


def test_no_code_of_a_tokenizer_runs(stranger: Path, tmp_path: Path, nobody_answers: None) -> None:
    (stranger / "tokenizer.json").rename(stranger / "vocab.json")
    with pytest.raises(UserError, match=r"which fedflame never does"):
        read_tokenizer(stranger)
    assert not (tmp_path / "mark").exists()


def test_every_call_that_loads_says_that_no_code_may_run() -> None:
    silent = []
    for path in sorted(SOURCE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr in LOADS
                and ast.unparse(node.func.value)
                != "PeftModel"  # it puts an adapter into a model that is there
            ):
                said = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                if said.get("trust_remote_code") != "False":
                    silent.append(f"{path.relative_to(SOURCE)}:{node.lineno}")
    assert silent == []
