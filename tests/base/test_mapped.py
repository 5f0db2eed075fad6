from __future__ import annotations

import errno
import json
import os
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.tiny_models import EXPERTS, HIDDEN, LAYERS, VOCABULARY, WIDTH, tiny_olmoe
from tests.tiny_runs import tiny_run
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedModel

from fedflame.base import mapped
from fedflame.base.loading import load_base_model
from fedflame.base.mapped import COMPLETE, load_mapped, map_base
from fedflame.base.memory_limit import SHARE, memory_limit
from fedflame.errors import UserError
from fedflame.server.checkpoint import read_checkpoint


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEDFLAME_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "mapped"


@pytest.fixture(params=["olmoe", "mixtral", "tied olmoe in two files"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Families whose experts have other names in a checkpoint; every dimension has its own size."""
    model: PreTrainedModel
    if request.param == "mixtral":
        config = MixtralConfig(
            vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=WIDTH, num_hidden_layers=LAYERS,
            num_local_experts=EXPERTS, num_attention_heads=4, num_key_value_heads=2,
        )  # fmt: skip
        model = MixtralForCausalLM(config)
        model.save_pretrained(tmp_path / "model")
    elif request.param == "olmoe":
        tiny_olmoe().save_pretrained(tmp_path / "model")
    else:
        tiny_olmoe(tie_word_embeddings=True).save_pretrained(tmp_path / "model", max_shard_size="60KB")
        assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1
    return tmp_path / "model"


def mapped_files() -> set[str]:
    lines = Path("/proc/self/maps").read_text().splitlines()
    return {line.split(maxsplit=5)[5] for line in lines if line.endswith(".safetensors")}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_is_the_model_that_transformers_loads_and_stays_on_disk(
    folder: Path, cache: Path, dtype: torch.dtype
) -> None:
    model, loading = map_base(folder, dtype)
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    weights, expected = model.state_dict(), stock.state_dict()
    assert list(weights) == list(expected) and not loading["missing_keys"]
    for name, value in expected.items():
        assert weights[name].dtype == value.dtype and torch.equal(weights[name], value), name
    if dtype == torch.float32:  # rows of these widths are too short for grouped_mm in bfloat16
        ids = torch.arange(3, 11).view(2, 4)
        assert torch.equal(model(input_ids=ids).logits, stock(input_ids=ids).logits)
    files = {str(path) for path in cache.glob("*/*.safetensors")}
    assert len(files) == LAYERS + 1 and files <= mapped_files()


def test_files_of_ones_own_are_mapped_however_they_are_split(tmp_path: Path) -> None:
    model = tiny_olmoe()
    values = list(model.state_dict().items())
    for number, part in enumerate((values[:5], values[5:])):
        save_file(dict(part), tmp_path / f"part-{number}.safetensors", metadata={"format": "pt"})
    mapped, loading = load_mapped(tmp_path, model.config, torch.float32)
    weights = mapped.state_dict()
    assert not any(loading.values()) and list(weights) == [name for name, _ in values]
    assert all(torch.equal(weights[name], value) for name, value in values)
    assert {str(tmp_path / f"part-{number}.safetensors") for number in (0, 1)} <= mapped_files()


def test_writing_into_a_mapped_weight_leaves_the_file_alone(folder: Path, cache: Path) -> None:
    model, _ = map_base(folder, torch.float32)
    before = {path: path.read_bytes() for path in cache.glob("*/*.safetensors")}
    weight = model.state_dict()["model.layers.0.mlp.experts.down_proj"]
    weight += 1
    assert {path: path.read_bytes() for path in cache.glob("*/*.safetensors")} == before
    again = map_base(folder, torch.float32)[0].state_dict()["model.layers.0.mlp.experts.down_proj"]
    torch.testing.assert_close(again + 1, weight, rtol=0, atol=0)


def test_files_are_made_once_and_anew_for_a_changed_checkpoint(folder: Path, cache: Path) -> None:
    map_base(folder, torch.float32)
    (made,) = cache.iterdir()
    stamps = {path: path.stat().st_mtime_ns for path in made.iterdir()}
    map_base(folder, torch.float32)
    assert {path: path.stat().st_mtime_ns for path in made.iterdir()} == stamps
    for path in folder.glob("*.safetensors"):
        later = time.time() + 5
        os.utime(path, (later, later))
    map_base(folder, torch.float32)
    assert len(list(cache.iterdir())) == 2


def test_a_build_that_was_cut_off_is_not_taken(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Path] = []

    def full(tensors: object, path: Path, **_: object) -> None:
        written.append(path)
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(mapped, "save_file", full)
        with pytest.raises(UserError) as refused:
            map_base(folder, torch.float32)
    assert str(refused.value).endswith(": cannot write the mapped model: No space left on device")
    assert written and list(cache.iterdir()) == []
    map_base(folder, torch.float32)
    (made,) = cache.iterdir()
    assert (made / COMPLETE).exists()


def test_of_two_builds_at_once_the_later_takes_the_files_of_the_other(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def overtaken(partial: Path, target: Path) -> Path:
        shutil.copytree(partial, target)
        return rename(partial, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", overtaken)
        map_base(folder, torch.float32)
    (made,) = cache.iterdir()
    assert (made / COMPLETE).exists()


def test_a_broken_file_is_named_with_what_to_do(folder: Path, cache: Path) -> None:
    map_base(folder, torch.float32)
    (made,) = cache.iterdir()
    path = made / "0001.safetensors"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(UserError, match=f"0001.safetensors: broken .*; delete {made}, and it is made anew"):
        map_base(folder, torch.float32)
    shutil.rmtree(made)
    map_base(folder, torch.float32)


@pytest.mark.parametrize("method", ["fp8", "mxfp4", "something-new"])
def test_quantised_weights_are_not_mapped_as_if_they_were_values(
    method: str, folder: Path, cache: Path, tmp_path: Path
) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": method}})
    )
    with pytest.raises(UserError, match=rf"its weights are quantised \({method}\), and cannot be mapped"):
        map_base(folder, torch.float32)
    assert not any(cache.rglob("*.safetensors"))


def test_a_checkpoint_without_a_weight_is_refused_as_ever(
    tiny_folder: Path, tmp_path: Path, cache: Path
) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"1 weights are missing, the first is model\.norm\.weight"):
        load_base_model(str(folder), "float32", memory_map=True)


@pytest.mark.slow
def test_a_run_on_mapped_weights_has_the_adapter_of_one_without(
    tiny_folder: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To rounding: base and LoRA are one product where the weights are held, and two where they are
    mapped."""
    base = sum(value.nbytes for value in load_file(tiny_folder / "model.safetensors").values())
    for name, limit in (("held", SHARE * base), ("mapped", SHARE * base - 1)):
        monkeypatch.setattr("fedflame.base.memory_limit.memory_limit", lambda limit=limit: limit)
        tiny_run(tiny_folder, tmp_path / name, "server.num_server_rounds=1")
        assert cache.exists() == (name == "mapped")
    held, mapped = (read_checkpoint(tmp_path / name).state for name in ("held", "mapped"))
    for name, value in held.adapter.tensors().items():
        torch.testing.assert_close(mapped.adapter.tensors()[name], value, rtol=0, atol=2e-6)
    assert len(list(cache.iterdir())) == 1


def test_the_memory_is_what_a_container_is_given_of_the_machines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = tmp_path / "memory.max"
    monkeypatch.setattr("fedflame.base.memory_limit.CGROUP_LIMIT", limit)
    physical = memory_limit()  # no such file: no container
    assert physical > 1 << 28
    for text, wanted in (("max\n", physical), ("1000000\n", 1_000_000), (f"{physical * 2}\n", physical)):
        limit.write_text(text)
        assert memory_limit() == wanted
