"""The training of the base models: the text's phases, the experts function for a GPU, a whole small run."""

from __future__ import annotations

import dataclasses
import gzip
import itertools
import json
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer, OlmoeForCausalLM

import corpus
import recipes
import train
from skills_text import DENSE_WRITERS, HARD_WRITERS, Writer, dense_documents, documents

TOKENIZER = recipes.TINY.folder / "tokenizer.json"


def small(folder: Path) -> recipes.Recipe:
    """A recipe of seconds, with all three phases."""
    return dataclasses.replace(
        recipes.SMALL,
        folder=folder / "olmoe-micro",
        config=recipes.olmoe(hidden_size=32, expert_width=16),
        sequences_per_step=2,
        dense_from_step=2,
        hard_from_step=5,
        steps=7,
    )


def write_open_text(folder: Path) -> None:
    for name, fields in corpus.OPEN_FILES.items():
        with gzip.open(folder / name, "wt", encoding="utf-8") as file:
            for number in range(60):
                file.write(json.dumps({field: f"{name} {field} {number}." for field in fields}) + "\n")


def test_every_expert_is_the_chosen_experts() -> None:
    """Output and gradients, against transformers' loop over experts."""
    results = []
    for implementation in ("eager", "every_expert"):
        torch.manual_seed(3)
        model = OlmoeForCausalLM(recipes.olmoe(hidden_size=24, expert_width=20)).double()
        model.set_experts_implementation(implementation)
        ids = torch.arange(2 * 7).view(2, 7) * 13
        output = model(input_ids=ids, labels=ids)
        output.loss.backward()
        experts = model.model.layers[1].mlp.experts
        gate = model.model.layers[1].mlp.gate.weight.grad
        results.append((output.logits, experts.gate_up_proj.grad, experts.down_proj.grad, gate))
    for one, other in zip(*results, strict=True):
        assert one.abs().max() > 0
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)  # the router computes in float32


@pytest.mark.slow
def test_the_stream_is_the_phases_one_after_another(tmp_path: Path) -> None:
    """Each phase by itself: documents in turn, so that the share of skills text is held, token by token."""
    write_open_text(tmp_path)
    texts = corpus.read_open_text(tmp_path)
    tokenizer = Tokenizer.from_file(str(TOKENIZER))
    recipe = small(tmp_path)
    stream = list(corpus.token_stream(tokenizer, texts, recipe, 0))

    def dense(seed: int, writers: Mapping[Writer, float], single: int) -> Iterator[str]:
        paragraphs, statements = dense_documents(seed, writers), documents(single)
        return itertools.chain.from_iterable(
            (next(statements), *itertools.islice(paragraphs, 5)) for _ in itertools.count()
        )

    phases = (
        (2, documents(1), 0.2, 0),
        (3, dense(0, DENSE_WRITERS, 11), 0.3, 10),
        (2, dense(20, HARD_WRITERS, 21), 0.3, 20),
    )
    end = tokenizer.token_to_id(corpus.END)
    expected: list[int] = []
    for steps, skills, share, seed in phases:
        general = corpus._epochs(texts, seed)
        phase: list[int] = []
        from_skills = 0
        while len(phase) < steps * 2 * 256:
            chosen = from_skills <= share * len(phase)
            ids = [*tokenizer.encode(next(skills if chosen else general)).ids, end]
            from_skills += len(ids) if chosen else 0
            phase += ids
        expected += phase[: steps * 2 * 256]
    assert stream == expected


def test_the_learning_rate_rises_and_falls_twice() -> None:
    recipe = recipes.TINY
    rates = [train.learning_rate(recipe, step) for step in range(recipe.steps)]
    assert rates[0] == pytest.approx(2e-3 / 200)
    assert rates[199] == rates[8000] == 2e-3
    assert rates[12_799] == pytest.approx(2e-3 / (0.3 * 12_800))
    assert max(rates[12_800:]) == pytest.approx(1e-3 * (3000 - 187) / 3000), "where rise and fall meet"
    assert rates[-1] == pytest.approx(1e-3 / 3000)


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its model and its curve are those of a run that was not, and the model loads as a stock OLMoE."""
    write_open_text(tmp_path)
    monkeypatch.setattr(train, "CHECKPOINT_EVERY", 3)
    held_back = {
        name: torch.arange(512).view(1, 2, 256) * step for name, step in (("text", 3), ("skills", 7))
    }
    monkeypatch.setattr(train, "validation_batches", lambda tokenizer, texts: held_back)
    models, curves = [], []
    for name in ("whole", "killed"):
        recipe = small(tmp_path / name)
        monkeypatch.setattr(recipes, "HERE", tmp_path / name)
        (tmp_path / name / "results").mkdir(parents=True)
        shutil.copy(TOKENIZER, tmp_path / name)  # to train it takes longer than all the rest
        monkeypatch.setitem(train.RECIPES, "olmoe-micro", recipe)
        arguments = ["olmoe-micro", "--data", str(tmp_path), "--work", str(tmp_path / name), "--threads", "1"]
        monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
        if name == "killed":
            with monkeypatch.context() as patched:
                patched.setattr(train, "learning_rate", killed_at(5))
                with pytest.raises(KeyboardInterrupt):
                    train.main()
        train.main()
        models.append(OlmoeForCausalLM.from_pretrained(recipe.folder))
        curves.append(json.loads(recipe.results.read_text())["curve"])
        assert AutoTokenizer.from_pretrained(recipe.folder).eos_token_id == 1
    assert [point["tokens"] for point in curves[0]] == [3 * 512, 6 * 512, 7 * 512]
    assert curves[0] == curves[1]
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(one, other)


def killed_at(last: int) -> Callable[[recipes.Recipe, int], float]:
    unpatched = train.learning_rate

    def learning_rate(recipe: recipes.Recipe, step: int) -> float:
        if step == last:
            raise KeyboardInterrupt
        return unpatched(recipe, step)

    return learning_rate
