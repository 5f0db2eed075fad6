"""The check of an exported folder passes what we write, and fails what a server would ignore or get wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.tiny_exports import TIERS, K, adapt, random_state, run_config, save_base, with_tiers
from tests.tiny_runs import invoke

from fedflame.checked_json import read_checked, write_checked
from fedflame.errors import UserError
from fedflame.experiment.adapter_folder import trained_run
from fedflame.exports import TrainedRun, check_export, export_adapter, merge_checkpoint
from fedflame.exports.layouts import Layout
from fedflame.exports.new_folder import RUN_FILE, checksums
from fedflame.moe.adapted_model import AdaptedModel
from fedflame.strategies.base import ServerState

WEIGHTS = "adapter_model.safetensors"


class Export:
    """A base of one family with a random state, to be exported."""

    def __init__(self, kind: str, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        self.base = save_base(kind, folder, dtype)
        self.adapted: AdaptedModel = adapt(self.base)
        self.state: ServerState = with_tiers(random_state(self.adapted))
        self.run: TrainedRun = trained_run(run_config(self.base), 1)

    def adapter(self, to: Path, layout: Layout | None = None) -> Path:
        export_adapter(self.state, self.run, self.adapted.model, to, layout=layout)
        return to

    def merged(self, to: Path, k: int = K) -> Path:
        merge_checkpoint(self.state, self.run, k, to)
        return to


@pytest.fixture(scope="module")
def olmoe(tmp_path_factory: pytest.TempPathFactory) -> Export:
    return Export("olmoe", tmp_path_factory.mktemp("olmoe") / "base")


def sealed(folder: Path) -> Path:
    """The folder with the checksums of what it holds now, as one that was written like this."""
    facts = read_checked(folder / RUN_FILE, "")
    write_checked(folder / RUN_FILE, facts | {"checksums": checksums(folder)})
    return folder


def changed(folder: Path, file: str, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("layout", ["per-expert", "fused"])
def test_an_adapter_folder_passes_at_every_k_that_it_has_an_adapter_for(
    layout: Layout, olmoe: Export, tmp_path: Path
) -> None:
    found = check_export(olmoe.adapter(tmp_path / "adapter", layout), olmoe.state, olmoe.run)
    assert [one.active_experts for one in found] == [K, 2, 1]
    for one in found:
        assert one.effect > 0.1 and one.error < one.tolerance == 1e-4
        assert "too little" not in one.in_words()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["qwen2_moe", "mixtral"])
def test_other_families_pass(kind: str, tmp_path: Path) -> None:
    export = Export(kind, tmp_path / "base")
    assert len(check_export(export.adapter(tmp_path / "adapter"), export.state, export.run)) == 3


@pytest.mark.parametrize("k", TIERS)
def test_a_merged_checkpoint_passes_at_its_k_with_the_rescaler(k: int, olmoe: Export, tmp_path: Path) -> None:
    [one] = check_export(olmoe.merged(tmp_path / "merged", k), olmoe.state, olmoe.run)
    assert (one.active_experts, one.tolerance) == (k, 1e-4)
    assert one.effect > 0.1


def test_a_merged_checkpoint_in_bfloat16_passes_with_its_own_tolerance(tmp_path: Path) -> None:
    export = Export("olmoe", tmp_path / "base", torch.bfloat16)
    [one] = check_export(export.merged(tmp_path / "merged"), export.state, export.run)
    assert one.tolerance == 5e-2 and 1e-4 < one.error < one.tolerance < one.effect


def test_a_zero_adapter_passes_with_a_word_on_it(olmoe: Export, tmp_path: Path) -> None:
    start = ServerState(olmoe.adapted.initial_adapter(0), olmoe.state.rescalers)
    export_adapter(start, olmoe.run, olmoe.adapted.model, tmp_path / "adapter")
    [one] = check_export(tmp_path / "adapter", start, olmoe.run)
    assert one.effect == 0 and one.in_words().endswith("the adapter does too little to be told from rounding")


EXPERT = "base_model.model.model.layers.1.mlp.experts.4.down_proj.lora_B.weight"


@pytest.mark.parametrize("below", ["", "k1"])
def test_a_zeroed_tensor_fails(below: str, olmoe: Export, tmp_path: Path) -> None:
    folder = olmoe.adapter(tmp_path / "adapter")
    changed(folder / below, WEIGHTS, lambda tensors: tensors[EXPERT].zero_())
    with pytest.raises(UserError, match="its checksum is wrong"):
        check_export(folder, olmoe.state, olmoe.run)
    with pytest.raises(UserError, match=r"its value experts\.1\.B2 is not the run's"):
        check_export(sealed(folder), olmoe.state, olmoe.run)


def test_a_renamed_tensor_fails(olmoe: Export, tmp_path: Path) -> None:
    folder = olmoe.adapter(tmp_path / "adapter")
    changed(folder, WEIGHTS, lambda tensors: tensors.update({f"x{EXPERT}": tensors.pop(EXPERT)}))
    with pytest.raises(UserError, match=rf"has, unlike the model, x{EXPERT}|lacks {EXPERT}"):
        check_export(sealed(folder), olmoe.state, olmoe.run)


def test_a_rescaler_of_another_run_fails(olmoe: Export, tmp_path: Path) -> None:
    folder = olmoe.adapter(tmp_path / "adapter")
    changed(folder, "rescalers.safetensors", lambda tensors: tensors["k2"].add_(1))
    with pytest.raises(UserError, match="its rescaler of k = 2 is not the run's"):
        check_export(sealed(folder), olmoe.state, olmoe.run)


def test_an_adapter_that_peft_does_not_apply_fails(
    olmoe: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = olmoe.adapter(tmp_path / "adapter")
    monkeypatch.setattr("fedflame.exports.check.PeftModel.from_pretrained", lambda model, _: model)
    with pytest.raises(UserError, match=r"its logits at k = 3 are .* of their norm from the run's"):
        check_export(folder, olmoe.state, olmoe.run)


@pytest.mark.parametrize("key", ["experts.4.down_proj", "self_attn.k_proj"])
def test_a_zeroed_tensor_in_a_merged_checkpoint_fails(key: str, olmoe: Export, tmp_path: Path) -> None:
    folder = olmoe.merged(tmp_path / "merged")

    def zero(tensors: dict[str, torch.Tensor]) -> None:
        next(value for name, value in tensors.items() if key in name).zero_()

    changed(folder, "model.safetensors", zero)
    with pytest.raises(UserError, match="its checksum is wrong"):
        check_export(folder, olmoe.state, olmoe.run)
    with pytest.raises(UserError, match="its logits at k = 3 are"):
        check_export(sealed(folder), olmoe.state, olmoe.run)


def test_a_renamed_tensor_in_a_merged_checkpoint_fails(olmoe: Export, tmp_path: Path) -> None:
    folder = olmoe.merged(tmp_path / "merged")
    changed(folder, "model.safetensors", lambda t: t.update({"other": t.pop("model.norm.weight")}))
    with pytest.raises(UserError, match=r"weights are missing, the first is model\.norm\.weight"):
        check_export(sealed(folder), olmoe.state, olmoe.run)


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--merge", "--active-experts", "1")])
def test_the_command_checks_what_it_writes(
    options: tuple[str, ...], undisturbed: Callable[..., Path], tmp_path: Path
) -> None:
    run = undisturbed("server.num_server_rounds=2", "training.learning_rate=0.05")
    result = invoke("export", run, "--to", tmp_path / "out", "--check", *options)
    assert result.exit_code == 0, result.stderr
    k = options[-1] if options else "4"
    assert f"checked at k = {k}: its logits are" in result.stdout
    facts = json.loads((tmp_path / "out" / RUN_FILE).read_text())
    assert facts["checksums"]
