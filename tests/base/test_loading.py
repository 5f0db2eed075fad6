"""Base models that load, whole and onto their device, and all that is refused in one line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.fake_cards import fake_cards
from tests.refusals import refusal_of
from tests.tiny_models import character_tokenizer, tiny_olmoe
from transformers import LlamaConfig, LlamaForCausalLM

from fedflame.base import loading
from fedflame.base.adapted import load_adapted_model
from fedflame.base.files import model_digest, resolve_model
from fedflame.base.loading import load_base_model
from fedflame.config.sections import AdapterConfig
from fedflame.errors import OutOfMemory, UserError
from fedflame.moe.families import find_moe_layers

SECONDS = 10.0
"""What a refusal may take at most, without the import of the libraries."""
NOT_LOADABLE = "model '{}': no such folder{}; use 'olmoe-tiny', a folder, or a hub id"
OFFLINE = ", and not loadable from the hub: HF_HUB_OFFLINE is set, and it is not in the cache"


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A complete model folder of the test's own, to be spoilt."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


def refusal(name_or_path: str | Path) -> str:
    start = time.monotonic()
    message = refusal_of(load_base_model, str(name_or_path), "float32")
    assert time.monotonic() - start < SECONDS
    return message


def rewrite_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


# What loads


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_complete_folder_gives_its_model_in_the_dtype_asked_for(
    tiny_folder: Path, dtype: torch.dtype
) -> None:
    model, tokenizer = load_base_model(str(tiny_folder), str(dtype).removeprefix("torch."))
    assert not model.training and model.dtype == dtype
    expected = tiny_olmoe().to(dtype).state_dict()
    assert expected.keys() == model.state_dict().keys()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    text = "Response: x\n"
    assert tokenizer.encode(text) == character_tokenizer().encode(text)
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)


def test_a_base_is_loaded_onto_its_device(tiny_folder: Path) -> None:
    """On `meta`, which computes nothing, so that no card is needed."""
    model, _ = load_base_model(str(tiny_folder), "bfloat16", "meta")
    assert {(value.device.type, value.dtype) for value in model.parameters()} == {("meta", torch.bfloat16)}
    assert {value.device.type for value in load_base_model(str(tiny_folder), "float32")[0].parameters()} == {
        "cpu"
    }


def test_all_cards_share_a_base_and_none_of_it_is_left_to_the_cpu(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []

    def load(source: str, **settings: Any) -> Any:
        asked.append(settings)
        raise ValueError("far enough")

    fake_cards(monkeypatch, tmp_path, (9, 8), free=(7, 6))
    monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", load)
    for device in ("balanced", "cuda:1"):
        with pytest.raises(UserError, match="far enough"):
            load_base_model(str(tiny_folder), "float32", device)
    assert (asked[0]["device_map"], asked[0]["max_memory"]) == ("balanced", {0: 7, 1: 6})
    assert asked[1]["device_map"] == {"": "cuda:1"} and "max_memory" not in asked[1]


def test_a_base_that_fills_the_memory_while_it_is_loaded_is_one_line(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(source: str, **settings: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 4 GiB.\nmore lines")

    monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", load)
    with pytest.raises(OutOfMemory) as full:
        load_base_model(str(tiny_folder), "bfloat16", "cuda:1")
    assert str(full.value) == (
        f"cuda:1 ran out of memory while loading {tiny_folder} in bfloat16; take a device with more memory"
    )


@pytest.mark.parametrize(("device", "mapped"), [("cpu", True), ("meta", False)])
def test_only_a_cpu_that_is_short_of_memory_maps_the_base(
    device: str, mapped: bool, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[object, ...]] = []

    def load(*arguments: object) -> Any:
        asked.append(arguments)
        raise UserError("far enough")

    monkeypatch.setattr("fedflame.base.adapted.is_short_of_memory", lambda needed: True)
    monkeypatch.setattr("fedflame.base.adapted.load_base_model", load)
    with pytest.raises(UserError, match="far enough"):
        load_adapted_model(str(tiny_folder), "float32", AdapterConfig(), device=device)
    assert asked == [(str(tiny_folder), "float32", device, mapped)]


def test_threads_load_one_after_another(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load, busy = loading._from_pretrained, threading.Lock()

    def alone(*arguments: Any) -> Any:
        assert busy.acquire(blocking=False), "two at once"
        try:
            time.sleep(0.05)  # so that the others would come, too
            return load(*arguments)
        finally:
            busy.release()

    monkeypatch.setattr(loading, "_from_pretrained", alone)
    with ThreadPoolExecutor(3) as threads:
        models = list(threads.map(lambda _: load_base_model(str(tiny_folder), "float32")[0], range(3)))
    assert len({id(model) for model in models}) == 3


def test_only_the_name_of_the_embedded_model_is_resolved() -> None:
    folder = Path(resolve_model("olmoe-tiny"))
    assert folder.parts[-3:] == ("fedflame", "assets", "olmoe-tiny")
    assert resolve_model("allenai/OLMoE-1B-7B-0924") == "allenai/OLMoE-1B-7B-0924"
    assert resolve_model("./olmoe-tiny") == "./olmoe-tiny"


# What is refused


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("nope", OFFLINE),
        ("nobody/no-such-model", OFFLINE),
        ("./no/such/folder", ""),
        ("/no/such/folder", ""),
        ("../no", ""),
        ("a/b/c", ", and not loadable from the hub: no such id, or a private one that needs HF_TOKEN"),
    ],
)
def test_a_missing_folder_or_an_id_without_the_hub(name: str, why: str) -> None:
    assert refusal(name) == NOT_LOADABLE.format(name, why)


def test_a_folder_without_a_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert refusal(folder) == f"model {folder}: the folder has no config.json"


def test_a_folder_without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert refusal(folder) == f"model {folder}: the folder has no .safetensors weights"


def test_a_folder_without_a_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    assert refusal(folder) == f"model {folder}: the folder has no tokenizer (tokenizer.json)"


def test_a_config_that_is_no_json(folder: Path) -> None:
    (folder / "config.json").write_text("{nope")
    assert refusal(folder).startswith(f"model {folder}/config.json: not JSON: ")


def test_a_missing_weight(folder: Path) -> None:
    rewrite_weights(folder, lambda weights: weights.pop("model.norm.weight"))
    assert refusal(folder) == f"model {folder}: 1 weights are missing, the first is model.norm.weight"


def test_a_layer_without_its_experts(folder: Path) -> None:
    def drop(weights: dict[str, torch.Tensor]) -> None:
        for name in [name for name in weights if ".1.mlp.experts." in name]:
            del weights[name]

    rewrite_weights(folder, drop)
    first = "model.layers.1.mlp.experts.down_proj"
    assert refusal(folder) == f"model {folder}: 2 weights are missing, the first is {first}"


def test_one_missing_expert(folder: Path) -> None:
    rewrite_weights(folder, lambda weights: weights.pop("model.layers.0.mlp.experts.1.down_proj.weight"))
    assert refusal(folder).startswith(f"model {folder}: ")


def test_a_weight_of_another_shape(folder: Path) -> None:
    rewrite_weights(folder, lambda weights: weights.update({"model.norm.weight": torch.ones(5)}))
    assert refusal(folder).startswith(f"model {folder}: ")


@pytest.mark.parametrize("kept", [0, 3000])
def test_weights_that_were_cut_off(folder: Path, kept: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    assert refusal(folder).startswith(f"model {folder}: cannot be loaded: ")


def test_a_broken_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{nope")
    assert refusal(folder).startswith(f"model {folder}: cannot be loaded: ")


def test_an_unknown_architecture(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "nonesuch"}
    (folder / "config.json").write_text(json.dumps(config))
    message = refusal(folder)
    assert message.startswith(f"model {folder}: cannot be loaded: ") and "nonesuch" in message


def test_a_dense_model(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=94, hidden_size=24, intermediate_size=20, num_hidden_layers=1, num_attention_heads=4
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    character_tokenizer().save_pretrained(tmp_path)
    assert refusal(tmp_path) == (
        f"model {tmp_path}: llama is no sparse mixture of experts: "
        "it has no num_experts, num_local_experts, n_routed_experts or moe_num_experts"
    )
    with pytest.raises(UserError):
        find_moe_layers(LlamaForCausalLM(config))


# Without HF_HUB_OFFLINE


CHILD = """
import gc, time
gc.disable()  # so that importing takes less
from fedflame.base.loading import load_base_model
from fedflame.errors import OutOfMemory, UserError
start = time.monotonic()
try:
    load_base_model("nobody/no-such-model", "float32")
except UserError as error:
    print(f"{time.monotonic() - start}|{error}")
"""


@pytest.mark.slow
def test_a_hub_that_cannot_be_reached_is_refused_soon_and_in_one_line(tmp_path: Path) -> None:
    # Nothing listens on port 9: the connection is refused, as without any network.
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    environment |= {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "no_proxy": "*"}
    done = subprocess.run(
        [sys.executable, "-c", CHILD], env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    seconds, _, message = done.stdout.strip().partition("|")
    assert float(seconds) < SECONDS
    start = "model 'nobody/no-such-model': no such folder, and not loadable from the hub"
    assert message.startswith(f"{start}: the hub cannot be reached (")
    assert "Retrying" not in done.stderr


def test_the_digest_of_a_model_changes_with_its_chat_template(tiny_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    before = model_digest(str(folder))
    assert before == model_digest(str(tiny_folder))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert model_digest(str(folder)) != before
