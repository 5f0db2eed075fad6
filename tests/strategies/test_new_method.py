"""A new method touches two places: its file, as docs/new-method.md shows it, and a row in the table."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from tests.tiny_runs import arguments, events, invoke

from fedflame.config.methods import METHODS, Method
from fedflame.server.checkpoint import read_checkpoint

pytestmark = pytest.mark.slow

PAGE = Path(__file__).parents[2] / "docs" / "new-method.md"
ROW = Method(
    "FedNova (arXiv 2007.07481)",
    "fednova_of_the_page:FedNova",
    frozenset({"active_experts", "rank", "counted_rows"}),
)
ONE_ROUND = ("server.num_server_rounds=1", "strategy.counted_rows=held")


@pytest.fixture
def fednova(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page's own code as a module, and its row."""
    code = re.search(r"```python\n(.*?class FedNova.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert code is not None
    (tmp_path / "fednova_of_the_page.py").write_text(code[1])
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(METHODS, "fednova", ROW)


def run_of(name: str, model: Path, run: Path, *overrides: str) -> dict[str, torch.Tensor]:
    result = invoke(*arguments(model, run, f"strategy.name={name}", *ONE_ROUND, *overrides))
    assert result.exit_code == 0, result.stderr
    return read_checkpoint(run).state.adapter.tensors()


@pytest.mark.usefixtures("fednova")
def test_fednova_is_fedavg_where_all_take_the_same_steps(tiny_folder: Path, tmp_path: Path) -> None:
    nova = run_of("fednova", tiny_folder, tmp_path / "nova")
    average = run_of("fedavg", tiny_folder, tmp_path / "average")
    assert any(value.any() for name, value in nova.items() if name.endswith("B1"))
    for name, value in average.items():
        torch.testing.assert_close(nova[name], value, rtol=1e-5, atol=1e-8)


@pytest.mark.usefixtures("fednova")
def test_every_command_knows_the_method_by_its_row(tiny_folder: Path, tmp_path: Path) -> None:
    # Under a compute budget those who afford more take more steps with the k of the smallest client.
    budget = ("training.budget=compute", "strategy.active_experts=1")
    nova = run_of("fednova", tiny_folder, tmp_path / "nova", *budget)
    average = run_of("fedavg", tiny_folder, tmp_path / "average", *budget)
    steps = [event["steps"] for event in events(tmp_path / "nova", "client")]
    assert len(set(steps)) > 1
    assert not torch.allclose(nova["experts.0.B1"], average["experts.0.B1"], rtol=1e-3)
    for command in (
        ("plan", "--set", "strategy.name=fednova", "--json"),
        ("evaluate", tmp_path / "nova", "--active-experts", "1", "--json"),
        ("report", tmp_path / "nova"),
        ("export", tmp_path / "nova", "--to", tmp_path / "exported"),
    ):
        result = invoke(*command)
        assert result.exit_code == 0, result.stderr
    assert "FedNova (arXiv 2007.07481)" in (tmp_path / "exported" / "README.md").read_text(encoding="utf-8")
    refused = invoke("plan", "--set", "strategy.name=fednova", "--set", "strategy.temperature=2")
    assert "fednova has no such option; flame has it" in refused.stderr
