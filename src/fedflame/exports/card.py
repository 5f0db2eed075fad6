"""The model card of an exported folder, in the form that the Hugging Face hub reads."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

from huggingface_hub import EvalResult, ModelCardData

from fedflame import __version__
from fedflame.config.sections import EMBEDDED_MODEL
from fedflame.data.encoder import PromptForm
from fedflame.exports.description import TEMPLATE_FILE, CardFacts, TrainedRun
from fedflame.run_files.standing import in_words
from fedflame.run_files.task_scores import TaskScores
from fedflame.strategies.base import ServerState

_HERE = "path/to/this/folder"
_MEASURES = {"loss": "nats per response token", "exact_match": "exact match", "rouge_l": "ROUGE-L"}
_HELD_OUT = "held-out-rows"
"""What the hub is told of rows that it does not have."""


def adapter_card(state: ServerState, run: TrainedRun, full_k: int) -> str:
    """Return the model card of an adapter: how it was trained, its tiers, and how to load it."""
    line, base = _base_expression(run)
    tiers = "\n".join(
        f"| {k} | {float(s.mean()):.4f} | {float(s.min()):.4f} to {float(s.max()):.4f} |"
        for k, s in sorted(state.rescalers.items(), reverse=True)
    )
    return f"""{_front_matter(run, "peft", "adapter", "lora")}

# LoRA adapter for {_name(run)}, trained with fedflame

{_training(run)}

```python
{line}from peft import PeftModel
from transformers import AutoModelForCausalLM

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({base}), {_place(run)})
```

This runs all {full_k} experts per token of the base model. With fewer, the routed output of each MoE layer
is multiplied by a rescaler s, one per layer and number of experts k. PEFT cannot store s. It matters only at
k < {full_k}, and `rescalers.safetensors` holds it ("k1" for k = 1). `fedflame evaluate` applies it;
`fedflame export --merge` writes a plain checkpoint for one k with s merged in.{_own_folders(state)}

| k | s, mean over layers | range |
|---|---|---|
{tiers}

{_rest(run)}
"""


def merged_card(run: TrainedRun, k: int, full_k: int) -> str:
    """Return the model card of a merged model: how it was trained, its k, and how to load it."""
    run = replace(run, card=run.card.at(k))
    return f"""{_front_matter(run, "transformers", "finetune")}

# {_name(run)}, fine-tuned with fedflame, {k} of {full_k} experts per token

{_training(run)}

The LoRA adapter and the rescalers of k = {k} are merged into the weights. Load it like any checkpoint:

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained({_place(run)})
```

{_rest(run)}
"""


def gguf_card(run: TrainedRun, file: str, k: int, advice: str) -> str:
    """Return the model card of a GGUF LoRA for one k; `advice` says how llama.cpp is told k."""
    run = replace(run, card=run.card.at(k))
    return f"""{_front_matter(run, "gguf", "adapter", "lora")}

# GGUF LoRA adapter for {_name(run)}, trained with fedflame

{_training(run)}

`{file}` is for llama.cpp, beside a GGUF of the base model. {advice}

{_rest(run)}
"""


def _rest(run: TrainedRun) -> str:
    return "\n\n".join(part for part in (_scores(run.card), _privacy(run.card), _prompt(run.prompt)) if part)


def _privacy(card: CardFacts) -> str:
    """Return the section on what the training rows may have told; empty if the run was not private."""
    if card.epsilon is None:
        return ""
    return (
        "## Privacy of the training rows\n\nThe clients clipped the gradient of each row and added noise "
        f"(DP-SGD): for each row, epsilon = {card.epsilon:.3g} at most, delta = {card.delta:g}, by what each "
        "client says of its noise. Rows that the hub holds out to score, and rows outside this run, are not "
        "covered."
    )


def _name(run: TrainedRun) -> str:
    """Return the name of the base model, without the folders of this machine."""
    return Path(run.base_model).name if _hub_id(run.base_model) is None else run.base_model


def _place(run: TrainedRun) -> str:
    """Return where the folder is, as an expression."""
    return json.dumps(run.card.hub_model_id or _HERE)


def _own_folders(state: ServerState) -> str:
    """Return a sentence on the folders with adapters for one k; empty if there are none."""
    if not state.tier_adapters:
        return ""
    folders = ", ".join(f"`k{k}`" for k in sorted(state.tier_adapters, reverse=True))
    return (
        f"\n\nThe folders {folders} below this one hold the adapters to use with that many experts per token."
    )


def _scores(card: CardFacts) -> str:
    """Return the section on scores by k; empty if none are known."""
    parts = []
    if card.held_out:
        measures = [name for name in _MEASURES if any(name in of_k for of_k in card.held_out.values())]
        rows = [
            [str(k), *(f"{of_k[name]:.4f}" if name in of_k else "" for name in measures)]
            for k, of_k in sorted(card.held_out.items(), reverse=True)
        ]
        parts.append("On held-out rows of the federation:\n\n" + _table(["k", *measures], rows))
    if card.tasks:
        parts.append(f"{card.tasks.in_words()}:\n\n{_task_table(card.tasks)}")
    if not parts:
        return ""
    return "\n\n".join(["## Scores by number of experts per token", *parts])


def _task_table(tasks: TaskScores) -> str:
    rows = []
    for at_k in tasks.by_k:
        for metric in at_k.metrics:
            error = "" if metric.stderr is None else f"{metric.stderr:.4f}"
            rows.append([str(at_k.active_experts), metric.task, metric.name, f"{metric.value:.4f}", error])
    speeds = [
        [
            str(at_k.active_experts),
            f"{at_k.prompt_tokens_per_second:.3g}",
            f"{at_k.new_tokens_per_second:.3g}",
        ]
        for at_k in tasks.by_k
    ]
    scores = _table(["k", "task", "metric", "value", "standard error"], rows)
    return f"{scores}\n\n{_table(['k', 'prompt tokens/s', 'new tokens/s'], speeds)}"


def _table(headers: list[str], rows: list[list[str]]) -> str:
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


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


def _front_matter(run: TrainedRun, library: str, relation: Literal["adapter", "finetune"], *tags: str) -> str:
    card, base = run.card, _hub_id(run.base_model)
    results = list(_eval_results(card))
    data = ModelCardData(
        base_model=base,
        base_model_relation=relation if base else None,
        datasets=card.dataset or None,
        license=card.license or None,
        license_name=card.license_name or None,
        license_link=card.license_link or None,
        library_name=library,
        pipeline_tag="text-generation",
        tags=["fedflame", "federated-learning", "moe", *tags],
        model_name=(card.hub_model_id.rpartition("/")[2] or "fedflame") if results else None,
        eval_results=results or None,
    )
    return f"---\n{data.to_yaml()}\n---"


def _eval_results(card: CardFacts) -> Iterator[EvalResult]:
    """Yield what the hub lists as results: one entry for each metric at each k. It takes finite values."""
    for k, of_k in sorted(card.held_out.items(), reverse=True):
        for name, value in of_k.items():
            rows = card.dataset or _HELD_OUT, "held-out rows of the federation"
            yield from _result(*rows, name, _MEASURES[name], k, value)
    for at_k in card.tasks.by_k if card.tasks else ():
        for one in at_k.metrics:
            yield from _result(one.task, one.task, one.name, one.name, at_k.active_experts, one.value)


def _result(
    dataset: str, dataset_name: str, kind: str, name: str, k: int, value: float
) -> Iterator[EvalResult]:
    if math.isfinite(value):
        yield EvalResult(
            task_type="text-generation",
            dataset_type=dataset,
            dataset_name=dataset_name,
            metric_type=kind,
            metric_value=value,
            metric_name=f"{name}, k = {k}",
        )


def _hub_id(name: str) -> str | None:
    """Return the name if it is one of the hub: it refuses a card whose base_model is a path."""
    return None if name == EMBEDDED_MODEL or Path(name).exists() or name.startswith((".", "/", "~")) else name


def _training(run: TrainedRun) -> str:
    lora, rounds = run.adapter, run.rounds
    attention = f" and on {','.join(lora.target_modules)}" if lora.target_modules else ""
    return (
        f"Trained with fedflame {__version__}, strategy {run.method}: {rounds} federated "
        f"{'round' if rounds == 1 else 'rounds'} over {run.num_clients} clients that afford "
        f"{','.join(map(str, run.active_experts))} experts per token, {run.local_work} per "
        f"client and round, learning rate {run.learning_rate:g}. "
        f"LoRA {lora.in_words} on every expert{attention}.{_best(run)}"
    )


def _best(run: TrainedRun) -> str:
    """Return a paragraph on the rounds that are exported; empty if it is the last for every k."""
    rounds = run.card.best_rounds
    if not rounds:
        return ""
    return f"\n\nFor each k, the round that was best on held-out rows: {in_words(rounds, run.rounds)}."


def _base_expression(run: TrainedRun) -> tuple[str, str]:
    """Return an import line and a Python expression for the path of the base model."""
    name = run.base_model
    if name == EMBEDDED_MODEL:
        return "from fedflame.base.files import resolve_model\n", f"resolve_model({json.dumps(name)})"
    return "", json.dumps(name)
