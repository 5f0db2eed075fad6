"""Tiny models of several families on disk, their runs' states, and PEFT in a process of its own."""

from __future__ import annotations

import atexit
import functools
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from tests.tiny_models import random_adapter
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    AutoModelForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from fedflame.config.run_config import RunConfig
from fedflame.config.sections import AdapterConfig, ModelConfig
from fedflame.messages import Adapter
from fedflame.moe.adapted_model import AdaptedModel
from fedflame.strategies.base import ServerState

# No two sizes agree: H = 32, 2I = 40, R = 4, E = 6, kv width 16.
SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "bos_token_id": None,
    "eos_token_id": 2,
}
MIXTRAL_NAMES = {"num_experts": "num_local_experts"}
K, TIERS, R, ALPHA = 3, (3, 2, 1), 4, 6.0
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
TOKENS = torch.randint(0, 50, (4, 12), generator=torch.Generator().manual_seed(0))
MODELS = {
    "olmoe": lambda: OlmoeForCausalLM(OlmoeConfig(intermediate_size=20, **SIZES)),
    "qwen2_moe": lambda: Qwen2MoeForCausalLM(
        Qwen2MoeConfig(moe_intermediate_size=20, shared_expert_intermediate_size=24, **SIZES)
    ),
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(moe_intermediate_size=20, head_dim=8, norm_topk_prob=True, **SIZES)
    ),
    "mixtral": lambda: MixtralForCausalLM(
        MixtralConfig(
            intermediate_size=20, **{MIXTRAL_NAMES.get(name, name): size for name, size in SIZES.items()}
        )
    ),
}

FRESH_PROCESS = """
import json, sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

tokens, result = sys.argv[1:]
tokens = torch.load(tokens)
for line in sys.stdin:
    outputs = []
    with torch.no_grad():
        for base, adapter in json.loads(line):
            plain = AutoModelForCausalLM.from_pretrained(base)
            before = plain(tokens).logits
            outputs.append((before, PeftModel.from_pretrained(plain, adapter)(tokens).logits))
    assert not any(name.startswith("fedflame") for name in sys.modules)
    torch.save(outputs, result)
    print("done", flush=True)
"""


class FreshProcess:
    """A process that knows transformers and PEFT alone, and runs models for the tests of this process."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="fedflame-peft-"))
        self._said, self._result = self._folder / "stderr.txt", self._folder / "result.pt"
        torch.save(TOKENS, self._folder / "tokens.pt")
        with self._said.open("w") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-c", FRESH_PROCESS, str(self._folder / "tokens.pt"), str(self._result)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
            )  # fmt: skip
        atexit.register(self._end)

    def logits(self, jobs: list[tuple[Path, Path]]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        assert self._process.stdin is not None and self._process.stdout is not None
        before = self._said.stat().st_size
        self._process.stdin.write(json.dumps([[str(path) for path in job] for job in jobs]) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        said = self._said.read_bytes()[before:].decode()
        assert answer == "done\n", said
        assert "missing" not in said.lower() and "unexpected" not in said.lower()
        result: list[tuple[torch.Tensor, torch.Tensor]] = torch.load(self._result)
        return result

    def _end(self) -> None:
        self._process.kill()
        self._process.communicate()
        shutil.rmtree(self._folder, ignore_errors=True)


fresh_process = functools.cache(FreshProcess)


def peft_logits(jobs: list[tuple[Path, Path]]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Logits of each base alone and under its adapter folder, by `from_pretrained` in a fresh process."""
    return fresh_process().logits(jobs)


def save_base(kind: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    torch.manual_seed(0)
    model = MODELS[kind]()
    for parameter in model.parameters():  # larger than by default, so that every error shows in the logits
        torch.nn.init.normal_(parameter, std=0.3)
    model.to(dtype).save_pretrained(folder)
    words = {f"w{i}": i for i in range(50)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0", pad_token="w1").save_pretrained(
        folder
    )
    return folder


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def adapt(
    folder: Path,
    r: int = R,
    alpha: float = ALPHA,
    targets: Sequence[str] = ATTENTION,
    use_rslora: bool = False,
) -> AdaptedModel:
    return AdaptedModel(load(folder), r, alpha, targets, use_rslora=use_rslora)


def random_state(adapted: AdaptedModel) -> ServerState:
    return ServerState(
        random_adapter(adapted, seed=1),
        {3: torch.ones(2), 2: torch.tensor([1.25, 0.75]), 1: torch.tensor([1.5, 2.25])},
    )


def with_merged(state: ServerState, rank: int) -> ServerState:
    """The state with random factors of this rank in its base."""
    generator = torch.Generator().manual_seed(rank)
    values = {}
    for name, value in state.adapter.tensors().items():
        shape = [size * rank // R if size in (R, 2 * R) else size for size in value.shape]
        values[name] = torch.randn(shape, generator=generator) * 0.2
    return replace(state, merged=Adapter.from_tensors(values))


def with_tiers(state: ServerState) -> ServerState:
    """The state with an adapter of its own at k = 2 and 1."""
    own = {k: state.adapter.combine(state.adapter, lambda a, _, k=k: a * (1 + k)) for k in (2, 1)}  # type: ignore[misc]
    return replace(state, tier_adapters=own)


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def our_logits(adapted: AdaptedModel, state: ServerState, k: int) -> torch.Tensor:
    adapted.load(state.adapter, state.rescalers[k], state.merged)
    with adapted.active_experts(k):
        return logits(adapted.model)


def assert_same_logits(got: torch.Tensor, ours: torch.Tensor) -> None:
    torch.testing.assert_close(got, ours, rtol=1e-5, atol=1e-5 * float(ours.abs().max()))


def run_config(base: Path, use_rslora: bool = False) -> RunConfig:
    return RunConfig(
        model=ModelConfig(model_name_or_path=str(base)),
        adapter=AdapterConfig(r=R, lora_alpha=ALPHA, use_rslora=use_rslora, target_modules=ATTENTION),
    )
