"""Write the model card of a model from the results of train.py.

    python pretraining/model_card.py olmoe-tiny

Reads the model's file in pretraining/results/ and writes README.md into the model's folder. It refuses a
model that cannot demonstrate partial activation.
"""

from __future__ import annotations

import argparse
import json
import textwrap
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from transformers import OlmoeForCausalLM

from corpus import OPEN_FILES
from recipes import CONTEXT, RECIPES, VOCABULARY_SIZE, Recipe
from train import DECAY_SHARE, SEED, WARMUP_STEPS

SETS = ("text", "skills", "dense skills")
CURVE_POINTS = 12
LINE_WIDTH = 110
SOURCES = {
    "p3-open-slice.jsonl.gz": (
        "yizhongw/self-instruct, data/finetuning/t0_train_50k: P3 (T0) prompts on adversarial_qa, "
        "common_gen, commonsense_qa, dbpedia, kilt, paws, qasc, quarel, quartz, quoref, ropes, wiki_bio "
        "and wiki_hop",
        "repository and prompts Apache-2.0; texts CC BY, CC BY-SA or MIT, by data set",
    ),
    "gsm8k-train.jsonl.gz": ("openai/grade-school-math, training split of GSM8K", "MIT"),
    "gpteacher-codegen-4k.jsonl.gz": (
        "teknium1/GPTeacher, Codegen; generated with GPT-4, and also found in the CodeAlpaca repository as "
        "new_codealpaca.json",
        "MIT",
    ),
    "books-cc0.jsonl.gz": (
        "Standard Ebooks: Pride and Prejudice (Austen), The Adventures of Sherlock Holmes (Doyle), "
        "Frankenstein (Shelley), The Time Machine (Wells), Autobiography (Franklin), The Call of the Wild "
        "(London), Great Expectations (Dickens)",
        "texts in the public domain; Standard Ebooks' own work CC0 1.0",
    ),
    "tldr-commands.jsonl.gz": ("tldr-pages/tldr, the tldr-pages team and contributors", "CC BY 4.0"),
}
"""File of `corpus.OPEN_FILES` -> its source and its licence."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", choices=RECIPES)
    recipe = RECIPES[parser.parse_args().model]
    write_card(recipe, recipe.results, recipe.folder / "README.md")


def write_card(recipe: Recipe, results_path: Path, card_path: Path) -> None:
    """Write the card from these results into the model's folder."""
    if not results_path.is_file():
        raise SystemExit(f"{results_path}: no such file; pretraining/train.py writes it at its end")
    if not card_path.parent.is_dir():
        raise SystemExit(f"{card_path.parent}: no such folder; pretraining/train.py writes the model into it")
    results = json.loads(results_path.read_text(encoding="utf-8"))
    require_usable(recipe, results)
    card_path.write_text(card(recipe, results), encoding="utf-8")


def require_usable(recipe: Recipe, results: dict[str, Any]) -> None:
    """Exit if an expert is unused, or if the loss does not rise as k falls."""
    layers, experts = recipe.config.num_hidden_layers, recipe.config.num_experts
    if [len(load) for load in results["expert_load"]] != [experts] * layers:
        raise SystemExit(f"expert_load: not {layers} layers of {experts} experts")
    for layer, load in enumerate(results["expert_load"]):
        unused = [expert for expert, share in enumerate(load) if not share > 0]
        if unused:
            raise SystemExit(f"layer {layer}: experts without a token: {unused}; every expert must be used")
    for name in SETS:
        for (k, loss), (fewer, higher) in pairwise(losses_by_k(results, name)):
            if not higher > loss:
                found = f"loss {loss:.3f} at k = {k}, {higher:.3f} at k = {fewer}"
                raise SystemExit(f"{name}: {found}; it must rise as k falls")


def losses_by_k(results: dict[str, Any], name: str) -> list[tuple[int, float]]:
    """Return (k, loss) pairs on one set, largest k first."""
    losses = {int(k): losses[name] for k, losses in results["loss_by_active_experts"].items()}
    return sorted(losses.items(), reverse=True)


def parameters(recipe: Recipe, active_experts: int) -> int:
    """Count the parameters that a token uses at this k; the tied embedding counts once."""
    config = recipe.config
    with torch.device("meta"):
        model = OlmoeForCausalLM(config)
    idle = config.num_experts - active_experts
    expert: int = 3 * config.hidden_size * config.intermediate_size
    whole = sum(value.numel() for value in model.parameters())
    active: int = whole - config.num_hidden_layers * idle * expert
    return active


def card(recipe: Recipe, results: dict[str, Any]) -> str:
    parts = (
        FRONT_MATTER,
        description(recipe),
        corpus_section(recipe),
        training_section(recipe, results),
        curve_section(recipe, results["curve"]),
        active_experts_section(recipe, results),
        routing_section(recipe, results["expert_load"]),
        f"Written by `python pretraining/model_card.py {recipe.name}` from `pretraining/results/`.",
    )
    return "\n\n".join(part.strip() for part in parts) + "\n"


FRONT_MATTER = """
---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
tags:
  - moe
  - olmoe
---
"""


def description(recipe: Recipe) -> str:
    config = recipe.config
    k = config.num_experts_per_tok
    return f"""
# {recipe.name}

A small OLMoE, trained from scratch on English text.

| | |
| --- | ---: |
| parameters | {parameters(recipe, config.num_experts):,} |
| of these met by one token at k = {k} | {parameters(recipe, k):,} |
| vocabulary, byte-level BPE with single digits | {VOCABULARY_SIZE} |
| hidden size | {config.hidden_size} |
| layers, each with a mixture of experts | {config.num_hidden_layers} |
| attention heads | {config.num_attention_heads} |
| experts per layer | {config.num_experts} |
| width of an expert | {config.intermediate_size} |
| active experts per token (top-k) | {k} |
| `norm_topk_prob` | {str(config.norm_topk_prob).lower()} |
| context, tokens | {CONTEXT} |
| dtype of the weights | bfloat16 |

**For:** {recipe.purpose}

**Not for:** use as an assistant or as a source of facts. It is a base model without instruction tuning or
alignment. Its text is often wrong, is English only, and may repeat what stands in its training text. What
holds for it need not hold for large models.
"""


def corpus_section(recipe: Recipe) -> str:
    rows = "\n".join(f"| {name} | {SOURCES[name][0]} | {SOURCES[name][1]} |" for name in OPEN_FILES)
    paragraphs = wrapped(f"""
The texts themselves are not part of this folder. Fields of a row are joined by line breaks. Dolly was not
used, because it serves as a federated task; files under CC BY-NC (Alpaca, AlpaGasus, CodeAlpaca) were not
used either. One hundredth of the documents is held back for validation.

The rest is skills text: statements that `pretraining/skills_text.py` generates, with the ingredients of
fedflame's skills tasks in other words than the tasks use. For the first {recipe.dense_from_step} steps it is
single statements and {recipe.skills_share:.0%} of the tokens. From then on it is {recipe.dense_share:.0%} of
the tokens: denser paragraphs that say several things about the same facts, and for one document in six single
statements. From step {recipe.hard_from_step} on the paragraphs have more of sums, sorted numbers, prices and
words.

Held-out problems of the skills tasks are left out of the skills text, except facts about words (first and
last letters, plurals, past tenses, opposites), which cannot be worked out from other facts. The mirror image
of a held-out problem may occur: a sum or product with its operands swapped, a comparison in the other order,
a date written the other way round. The open texts are not filtered, and GSM8K has sums in its answers.
""")
    return f"## Text\n\n| file | source | licence |\n| --- | --- | --- |\n{rows}\n\n{paragraphs}"


def training_section(recipe: Recipe, results: dict[str, Any]) -> str:
    cpu, wall = span(results["cpu_seconds"]), span(results["wall_seconds"])
    tokens = results["curve"][-1]["tokens"]
    paragraph = wrapped(f"""
`python pretraining/train.py {recipe.name}` on {recipe.machine}: {cpu} of CPU time, {wall} by the clock.
{results["step"]:,} steps of {recipe.sequences_per_step} sequences of {CONTEXT} tokens, {tokens:,} tokens in
all, seed {SEED}, bf16 autocast over fp32 weights. AdamW with betas 0.9 and 0.95 and weight decay 0.05,
gradient norm clipped to 1. The learning rate rises over {WARMUP_STEPS} steps to {recipe.peak_learning_rate},
stays there, and falls linearly to zero over the last {DECAY_SHARE:.0%} of the first {recipe.hard_from_step}
steps; from there it rises once more, to {recipe.second_peak_learning_rate}, and falls linearly to zero.
Load-balancing loss with coefficient {recipe.config.router_aux_loss_coef}.
""")
    return f"## Training\n\n{paragraph}"


def span(seconds: float) -> str:
    """Format seconds as hours, or as minutes if below one hour."""
    return f"{seconds / 3600:.1f} hours" if seconds >= 3600 else f"{seconds / 60:.1f} minutes"


def wrapped(text: str) -> str:
    """Wrap paragraphs, which are separated by blank lines, to `LINE_WIDTH`."""
    paragraphs = text.strip().split("\n\n")
    return "\n\n".join(textwrap.fill(part, LINE_WIDTH, break_on_hyphens=False) for part in paragraphs)


def curve_section(recipe: Recipe, curve: list[dict[str, float]]) -> str:
    rows = "\n".join(
        f"| {point['tokens'] / 1e6:.1f} | {point['training']:.3f} | "
        + " | ".join(f"{point[name]:.3f}" if name in point else "-" for name in SETS)
        + " |"
        for point in thinned(recipe, curve)
    )
    paragraph = wrapped(f"""
In nats per token. `training` is the mean over the steps since the measurement before, without the
load-balancing loss; the others are on 64 sequences each: open text that was held back, and skills text of
other seeds; `-` was not measured. P3 asks several questions of one passage, so that documents held back share
passages with those trained on, and a model that has learned these by heart gains on `text`. The denser
paragraphs begin after {recipe.dense_from_step * recipe.tokens_per_step / 1e6:.1f} M tokens.
""")
    head = f"| M tokens | training | {' | '.join(SETS)} |\n| ---: | ---: | ---: | ---: | ---: |"
    return f"## Loss\n\n{paragraph}\n\n{head}\n{rows}"


def thinned(recipe: Recipe, curve: list[dict[str, float]]) -> list[dict[str, float]]:
    """Return about `CURVE_POINTS` evenly spaced points, including first, last and the end of phase one."""
    last = len(curve) - 1
    chosen = {round(last * number / (CURVE_POINTS - 1)) for number in range(CURVE_POINTS)}
    end_of_first_phase = recipe.dense_from_step * recipe.tokens_per_step
    return [
        point
        for number, point in enumerate(curve)
        if number in chosen or point["tokens"] == end_of_first_phase
    ]


def active_experts_section(recipe: Recipe, results: dict[str, Any]) -> str:
    columns = {name: losses_by_k(results, name) for name in SETS}
    rows = []
    for number, (k, _) in enumerate(columns[SETS[0]]):
        cells = []
        for name in SETS:
            loss = columns[name][number][1]
            step = f"{loss - columns[name][number - 1][1]:+.3f}" if number else "-"
            cells += [f"{loss:.3f}", step]
        rows.append(f"| {k} | {parameters(recipe, k):,} | " + " | ".join(cells) + " |")
    paragraph = wrapped("""
The finished model in bfloat16, on the same sequences, with k active experts and nothing else changed. `step`
is the difference to the row above.
""")
    head = f"| k | parameters met | {' | '.join(f'{name} | step' for name in SETS)} |"
    rule = "| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
    return "\n".join(["## Loss with fewer active experts", "", paragraph, "", head, rule, *rows])


def routing_section(recipe: Recipe, expert_load: list[list[float]]) -> str:
    rows = "\n".join(
        f"| {layer} | {sum(share > 0 for share in load)} of {len(load)} | "
        f"{min(load) * len(load):.2f} | {max(load) * len(load):.2f} |"
        for layer, load in enumerate(expert_load)
    )
    paragraph = wrapped(f"""
Load of an expert: its share of the routed slots at k = {recipe.config.num_experts_per_tok}, on 8
sequences of each set; 1 is the uniform load.
""")
    head = "| layer | experts used | least load | greatest load |\n| ---: | ---: | ---: | ---: |"
    return f"## Routing\n\n{paragraph}\n\n{head}\n{rows}"


if __name__ == "__main__":
    main()
