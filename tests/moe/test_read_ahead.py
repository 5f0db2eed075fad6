from __future__ import annotations

import re
import time
from pathlib import Path
from queue import SimpleQueue

import pytest
import torch
from safetensors.torch import save_file
from tests.random_rows import random_rows
from tests.tiny_models import ALPHA, ATTENTION, PAD, RANK, TOP_K, random_batch, tiny_olmoe

from fedflame.base.mapped import load_mapped
from fedflame.config.words import Checkpointed
from fedflame.messages import RoundPlan
from fedflame.moe import read_ahead as module
from fedflame.moe.adapted_model import AdaptedModel
from fedflame.moe.families import MoELayer
from fedflame.moe.read_ahead import read_ahead
from fedflame.training.fine_tune import fine_tune
from fedflame.training.token_loss import token_losses
from fedflame.wire.codec import encode_update

LAYERS = 3


def adapted_model(checkpointing: Checkpointed = "none") -> AdaptedModel:
    model = tiny_olmoe(num_hidden_layers=LAYERS)
    return AdaptedModel(model, RANK, ALPHA, ATTENTION, checkpointing, mapped=True)


def update_bytes(adapted: AdaptedModel) -> bytes:
    plan = RoundPlan(
        round=1, client=0, seed=0, active_experts=2, rescaler="learned", rescaler_values=torch.ones(LAYERS),
        adapter=adapted.initial_adapter(0), learning_rate=0.01, weight_decay=0.1, batch_size=2, max_steps=3,
    )  # fmt: skip
    rows = random_rows([13] * 4, 50, seed=3, prompt=3)
    update = fine_tune(adapted, rows, plan, PAD)
    return encode_update(update, plan)


def test_an_update_has_the_same_bytes() -> None:
    adapted = adapted_model()
    expected = update_bytes(adapted)
    read_ahead(adapted.layers)
    assert update_bytes(adapted) == expected


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> SimpleQueue[SimpleQueue[MoELayer]]:
    """The queue of what `read_ahead` asks for, which nobody reads."""
    queues: SimpleQueue[SimpleQueue[MoELayer]] = SimpleQueue()
    monkeypatch.setattr(module, "_read", queues.put)
    return queues


def names(queue: SimpleQueue[MoELayer]) -> list[str]:
    return [queue.get().name for _ in range(queue.qsize())]


@pytest.mark.parametrize("checkpointing", ["none", "layers"])
def test_forward_asks_for_the_layer_above_and_backward_for_the_one_below(
    checkpointing: Checkpointed, asked: SimpleQueue[SimpleQueue[MoELayer]]
) -> None:
    adapted = adapted_model(checkpointing)
    read_ahead(adapted.layers)
    wanted, (first, second, third) = asked.get(timeout=60), (layer.name for layer in adapted.layers)
    with adapted.training(TOP_K):
        loss = token_losses(adapted, random_batch()).sum()
        forward = names(wanted)[:2]
        loss.backward()
    assert forward == [second, third] and names(wanted) == [second, first]


def test_few_tokens_ask_for_nothing(asked: SimpleQueue[SimpleQueue[MoELayer]]) -> None:
    adapted = adapted_model()
    read_ahead(adapted.layers)
    with adapted.active_experts(1):
        adapted.model(input_ids=torch.arange(3, 26).view(1, -1))
        assert names(wanted := asked.get(timeout=60)) == []
        adapted.model(input_ids=torch.arange(3, 27).view(1, -1))
        assert len(names(wanted)) == 2


def test_what_is_asked_for_becomes_resident(tmp_path: Path) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 208, "num_hidden_layers": 2}
    model = tiny_olmoe(**sizes)
    for name, value in model.state_dict().items():
        save_file({name: value}, tmp_path / f"{name}.safetensors", metadata={"format": "pt"})
    mapped, _ = load_mapped(tmp_path, model.config, torch.float32)
    adapted = AdaptedModel(mapped, RANK, ALPHA, (), mapped=True)
    wanted: SimpleQueue[MoELayer] = SimpleQueue()
    module.Thread(target=module._read, args=(wanted,), daemon=True).start()
    above = "model.layers.1.mlp.experts.gate_up_proj"
    untouched = resident(tmp_path / f"{above}.safetensors")
    wanted.put(adapted.layers[1])
    end = time.monotonic() + 60
    while resident(tmp_path / f"{above}.safetensors") < (whole := model.state_dict()[above].nbytes):
        assert time.monotonic() < end, "not resident within a minute"
        time.sleep(0.01)
    assert untouched < whole / 2


def resident(path: Path) -> int:
    """Bytes of the file that this process has mapped to memory."""
    mappings = re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text())
    of_file = (mapping for mapping in mappings if mapping.partition("\n")[0].endswith(str(path)))
    return sum(int(size) * 1024 for mapping in of_file for size in re.findall(r"\nRss: +(\d+)", mapping))
