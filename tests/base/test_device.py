"""The choice of the device and of the dtype on it, with cards that torch is only told of."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.fake_cards import MODEL, fake_cards
from tests.refusals import refusal_of

from fedflame.base import device
from fedflame.base.device import ALL_CARDS, Card, DeviceChoice, choose_device, device_facts, device_in_words
from fedflame.base.dtype import DtypeChoice, choose_dtype
from fedflame.cost.model_shape import read_model_shape

TWO = (80_000_000_000, 24_000_000_000)
CARDS = tuple(Card(f"cuda:{index}", MODEL, memory, (9, 0)) for index, memory in enumerate(TWO))


def refusal(wanted: str, key: str = "model.device") -> str:
    return refusal_of(choose_device, wanted, key)


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ("auto", DeviceChoice("cuda:0", "auto takes a card where there is one", CARDS)),
        ("cuda", DeviceChoice("cuda:0", "as model.device asks", CARDS)),
        ("cuda:0", DeviceChoice("cuda:0", "as model.device asks", CARDS[:1])),
        ("cuda:1", DeviceChoice("cuda:1", "as model.device asks", CARDS[1:])),
        ("cpu", DeviceChoice("cpu", "as model.device asks")),
    ],
)
def test_with_two_cards(
    wanted: str, expected: DeviceChoice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_cards(monkeypatch, tmp_path, TWO)
    assert choose_device(wanted) == expected


def test_without_a_driver_torch_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "DRIVERS", (Path("/no/such/driver"),))
    monkeypatch.setitem(sys.modules, "torch", None)  # whoever imports it now gets an ImportError
    assert choose_device("auto") == DeviceChoice("cpu", "this machine has no NVIDIA driver")
    assert choose_device("cpu", "trainer.device").reason == "as trainer.device asks"


def test_a_torch_without_cuda_is_the_reason_where_there_is_a_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_cards(monkeypatch, tmp_path, ())
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch, "__version__", "2.13.0+cpu")
    assert choose_device("auto") == DeviceChoice("cpu", "torch 2.13.0+cpu has no CUDA")
    assert refusal("cuda:2", "trainer.device") == (
        "trainer.device = 'cuda:2': torch 2.13.0+cpu has no CUDA; install a CUDA build of torch, or set "
        "trainer.device to 'cpu'"
    )


def test_a_card_that_torch_cannot_use_is_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver knows of the card, and CUDA does not start."""
    fake_cards(monkeypatch, tmp_path, (10,))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch, "__version__", "2.13.0+cu130")
    assert choose_device("auto") == DeviceChoice("cpu", "torch 2.13.0+cu130 finds no card that it can use")
    assert refusal("cuda") == (
        "model.device = 'cuda': torch 2.13.0+cu130 finds no card that it can use; look at nvidia-smi and "
        "CUDA_VISIBLE_DEVICES, or set model.device to 'cpu'"
    )


def test_a_card_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_cards(monkeypatch, tmp_path, TWO)
    assert refusal("cuda:2") == (
        "model.device = 'cuda:2': torch can use cuda:0, cuda:1 here; name one of these, or 'auto'"
    )


def test_a_card_is_kept_and_shown_with_its_memory_and_versions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_cards(monkeypatch, tmp_path, TWO)
    assert device_facts(choose_device("cuda:1")) == {
        "device": "cuda:1", "gpu": MODEL, "gpus": 1, "gpu_memory": TWO[1],
        "cuda": "13.0", "driver": "580.65.06",
    }  # fmt: skip
    words = "cuda:1, NVIDIA H200, 24.0 GB, CUDA 13.0, driver 580.65.06 (as model.device asks)"
    assert device_in_words(choose_device("cuda:1")) == words
    monkeypatch.setattr(device, "DRIVER_VERSION", tmp_path / "none")
    assert device_facts(choose_device("cuda:1"))["driver"] is None
    assert device_in_words(choose_device("cuda:1")) == words.replace(", driver 580.65.06", "")
    assert device_facts(choose_device("cuda"))["gpus"] == 1, "the others hold no part of the base"
    assert device_facts(choose_device("cuda"))["gpu_memory"] == TWO[0]
    together = replace(choose_device("cuda"), name=ALL_CARDS, reason="slowly")
    assert device_facts(together)["gpus"] == 2 and device_facts(together)["gpu_memory"] == sum(TWO)
    assert device_in_words(together) == "balanced, 2 x NVIDIA H200, 104.0 GB, CUDA 13.0 (slowly)"
    assert device_facts(choose_device("cpu")) == {"device": "cpu"}
    assert device_in_words(choose_device("cpu")) == "cpu (as model.device asks)"


@pytest.mark.parametrize(
    ("capability", "expected"),
    [((9, 0), "bfloat16"), ((8, 0), "bfloat16"), ((12, 0), "bfloat16"), ((7, 5), "float16")],
)
def test_a_card_gets_the_16_bits_that_it_has(
    capability: tuple[int, int],
    expected: str,
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake_cards(monkeypatch, tmp_path, TWO, capability=capability)
    choice = choose_dtype("auto", read_model_shape(tiny_folder), choose_device("auto"))
    reason = f"compute capability {capability[0]}.{capability[1]}"
    assert choice == DtypeChoice(expected, reason)  # type: ignore[arg-type]


def test_float32_on_a_card_is_taken_with_a_warning(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_cards(monkeypatch, tmp_path, TWO)
    shape = read_model_shape(tiny_folder)
    assert choose_dtype("float32", shape, choose_device("auto")) == DtypeChoice(
        "float32", "as model.dtype asks; slow, since a card multiplies fastest in 16 bits"
    )
    assert choose_dtype("float16", shape, choose_device("auto")).reason == "as model.dtype asks"
    assert choose_dtype("float32", shape, choose_device("cpu")).reason == "as model.dtype asks"
