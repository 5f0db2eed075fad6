"""Describe an exported folder: `fedflame.json`, and the model card that the hub shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedflame import __version__
from fedflame.config.sections import EMBEDDED_MODEL, AdapterConfig
from fedflame.data.encoder import PromptForm
from fedflame.moe.families import MoELayer
from fedflame.strategies.base import ServerState

FORMAT_VERSION = 2
TEMPLATE_FILE = "chat_template.jinja"
"""Where tokenizers keep their chat template."""


@dataclass(frozen=True)
class TrainedRun:
    """The facts about a run that an export needs."""

    base_model: str
    """Name, hub id or folder of the base model."""
    adapter: AdapterConfig
    """r and lora_alpha of the run. Merged factors add ranks in the export."""
    method: str
    """The method in words, with its paper."""
    strategy: Mapping[str, Any]
    """The section `strategy` of the configuration."""
    num_clients: int
    active_experts: Sequence[int]
    """Experts per token that the clients afford, as configured."""
    local_work: str
    """What each client does in each round, such as "at most 80 steps"."""
    learning_rate: float
    rounds: int
    """Number of federated rounds that were run."""
    prompt: PromptForm
    """How the rows became text."""


def run_facts(state: ServerState, run: TrainedRun, layers: Sequence[MoELayer]) -> dict[str, Any]:
    """Return the content of `fedflame.json`."""
    return {
        "format_version": FORMAT_VERSION,
        "fedflame_version": __version__,
        "base_model": run.base_model,
        "strategy": dict(run.strategy),
        "rounds": run.rounds,
        "num_experts_per_tok": layers[0].num_experts_per_tok,
        "tiers": sorted(state.rescalers, reverse=True),
    }


def adapter_card(state: ServerState, run: TrainedRun, full_k: int) -> str:
    """Return the model card of an adapter: how it was trained, its tiers, and how to load it."""
    line, base = _base_expression(run)
    tiers = "\n".join(
        f"| {k} | {float(s.mean()):.4f} | {float(s.min()):.4f} to {float(s.max()):.4f} |"
        for k, s in sorted(state.rescalers.items(), reverse=True)
    )
    return f"""{_front_matter(run, "peft", "lora")}

# LoRA adapter for {run.base_model}, trained with fedflame

{_training(run)}

```python
{line}from peft import PeftModel
from transformers import AutoModelForCausalLM

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({base}), "path/to/this/folder")
```

This runs all {full_k} experts per token of the base model. With fewer, the routed output of each MoE layer
is multiplied by a rescaler s, one per layer and number of experts k. PEFT cannot store s. It matters only at
k < {full_k}, and `rescalers.safetensors` holds it ("k1" for k = 1). `fedflame evaluate` applies it;
`fedflame export --merge` writes a plain checkpoint for one k with s merged in.{_own_folders(state)}

| k | s, mean over layers | range |
|---|---|---|
{tiers}

{_prompt(run.prompt)}
"""


def _own_folders(state: ServerState) -> str:
    """Return a sentence on the folders with adapters for one k; empty if there are none."""
    if not state.tier_adapters:
        return ""
    folders = ", ".join(f"`k{k}`" for k in sorted(state.tier_adapters, reverse=True))
    return (
        f"\n\nThe folders {folders} below this one hold the adapters to use with that many experts per token."
    )


def merged_card(run: TrainedRun, k: int, full_k: int) -> str:
    """Return the model card of a merged model: how it was trained, its k, and how to load it."""
    return f"""{_front_matter(run, "transformers")}

# {run.base_model}, fine-tuned with fedflame, {k} of {full_k} experts per token

{_training(run)}

The LoRA adapter and the rescalers of k = {k} are merged into the weights. Load it like any checkpoint:

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
```

{_prompt(run.prompt)}
"""


def _prompt(form: PromptForm) -> str:
    """Return the section on the prompt that was trained: whoever serves the model must send the same."""
    chats = {
        "model": "The rows were rendered by the base model's own chat template, as chat servers do.",
        "given": f"The rows were rendered by the chat template in `{TEMPLATE_FILE}` of this folder; a chat "
        "server must use it, too.",
        "plain": "The rows were trained in a plain form and not by a chat template. A row with a context has "
        "the line `Input: ...` after the instruction; earlier turns stand before it in the same form.",
    }
    special = "without special tokens, since it has all that it needs"
    if form.template == "plain":
        special = (
            f"with {form.beginning} before it, as the tokenizer puts it"
            if form.beginning
            else "with nothing before it"
        )
    exact = f"The prompt of an instruction is exactly this Python string, tokenised {special}:"
    example = f"\n\n{exact}\n\n    {form.prompt!r}" if form.prompt else ""
    end = f"\n\nAn answer ends with {form.end}." if form.end else ""
    return f"## Prompt\n\n{chats.get(form.template, chats['plain'])}{example}{end}"


def _front_matter(run: TrainedRun, library: str, *tags: str) -> str:
    base = run.base_model
    # The hub refuses a card whose base_model is a path.
    lines = [] if Path(base).is_dir() else [f"base_model: {base}"]
    lines += [f"library_name: {library}", "pipeline_tag: text-generation", "tags:"]
    return "\n".join(
        ["---", *lines, *(f"- {tag}" for tag in ("fedflame", "federated-learning", "moe", *tags)), "---"]
    )


def _training(run: TrainedRun) -> str:
    # The data set is not named, because a card is made to be shared and the data is private.
    lora, rounds = run.adapter, run.rounds
    attention = f" and on {','.join(lora.target_modules)}" if lora.target_modules else ""
    return (
        f"Trained with fedflame {__version__}, strategy {run.method}: {rounds} federated "
        f"{'round' if rounds == 1 else 'rounds'} over {run.num_clients} clients that afford "
        f"{','.join(map(str, run.active_experts))} experts per token, {run.local_work} per "
        f"client and round, learning rate {run.learning_rate:g}. "
        f"LoRA r = {lora.r}, lora_alpha = {lora.lora_alpha:g} on every expert{attention}."
    )


def _base_expression(run: TrainedRun) -> tuple[str, str]:
    """Return an import line and a Python expression for the path of the base model."""
    name = run.base_model
    if name == EMBEDDED_MODEL:
        return "from fedflame.base.files import resolve_model\n", f"resolve_model({name!r})"
    return "", repr(name)
