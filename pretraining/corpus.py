"""Build the pre-training text from openly licensed files and generated statements about the skills."""

from __future__ import annotations

import gzip
import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from recipes import VOCABULARY_SIZE, Recipe
from skills_text import DENSE_WRITERS, HARD_WRITERS, dense_documents, documents

PAD, END = "<|padding|>", "<|endoftext|>"
# Dolly is the federated task and the Alpaca family is CC BY-NC: neither may be listed here.
OPEN_FILES = {
    "p3-open-slice.jsonl.gz": ("instruction", "input", "output"),
    "gsm8k-train.jsonl.gz": ("question", "answer"),
    "gpteacher-codegen-4k.jsonl.gz": ("instruction", "input", "output"),
    "books-cc0.jsonl.gz": ("text",),
    "tldr-commands.jsonl.gz": ("instruction", "input", "output"),
}
ENCODED_AT_ONCE = 1024
"""Documents that the tokenizer encodes in parallel."""


def read_open_text(folder: Path) -> list[str]:
    """Return one document per row of `OPEN_FILES`, in file order, with each field on a line of its own."""
    texts = []
    for name, fields in OPEN_FILES.items():
        with gzip.open(folder / name, "rt", encoding="utf-8") as lines:
            for line in lines:
                row = json.loads(line)
                parts = (row[field].replace(END, "").strip() for field in fields)
                texts.append("\n".join(part for part in parts if part))
    return texts


def split_validation(texts: list[str], seed: int) -> tuple[list[str], list[str]]:
    """Shuffle by the seed and split into (training, validation), with one hundredth for validation."""
    shuffled = list(texts)
    random.Random(f"validation-{seed}").shuffle(shuffled)
    cut = len(shuffled) // 100
    return shuffled[cut:], shuffled[:cut]


def train_tokenizer(texts: list[str], seed: int) -> Tokenizer:
    """Train a byte-level BPE with single digits, on the same mix of texts as the model."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=[PAD, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    skills = itertools.islice(documents(seed), 20_000)
    tokenizer.train_from_iterator(itertools.chain(texts, skills), trainer)
    return tokenizer


def token_stream(tokenizer: Tokenizer, texts: list[str], recipe: Recipe, seed: int) -> Iterator[int]:
    """Yield the token ids of all steps: open text mixed with skills text, in the recipe's three phases."""
    single = documents(seed + 1)
    dense = _dense_and_single(dense_documents(seed, DENSE_WRITERS), documents(seed + 11))
    hard = _dense_and_single(dense_documents(seed + 20, HARD_WRITERS), documents(seed + 21))
    phases = (
        (0, recipe.dense_from_step, single, recipe.skills_share),
        (10, recipe.hard_from_step - recipe.dense_from_step, dense, recipe.dense_share),
        (20, recipe.steps - recipe.hard_from_step, hard, recipe.dense_share),
    )
    for offset, steps, skills, share in phases:
        mixed = _mix(tokenizer, _epochs(texts, seed + offset), skills, share)
        yield from itertools.islice(mixed, steps * recipe.tokens_per_step)


def _dense_and_single(dense: Iterator[str], single: Iterator[str]) -> Iterator[str]:
    """Yield one document of single statements for every five dense ones; their wordings differ."""
    return (next(single) if number % 6 == 0 else next(dense) for number in itertools.count())


def _mix(tokenizer: Tokenizer, general: Iterator[str], skills: Iterator[str], share: float) -> Iterator[int]:
    """Yield token ids without end; skills text makes up the share `share`."""
    of_general, of_skills = _encoded(tokenizer, general), _encoded(tokenizer, skills)
    skills_tokens = total_tokens = 0
    while True:
        is_skills = skills_tokens <= share * total_tokens
        ids = next(of_skills if is_skills else of_general)
        skills_tokens += len(ids) * is_skills
        total_tokens += len(ids)
        yield from ids


def _encoded(tokenizer: Tokenizer, texts: Iterator[str]) -> Iterator[list[int]]:
    """Yield the token ids of each text, with the end token."""
    end = tokenizer.token_to_id(END)
    assert end is not None, "the trainer was given END as a special token"
    while True:
        for encoding in tokenizer.encode_batch(list(itertools.islice(texts, ENCODED_AT_ONCE))):
            yield [*encoding.ids, end]


def _epochs(texts: list[str], seed: int) -> Iterator[str]:
    for epoch in itertools.count():
        order = list(range(len(texts)))
        random.Random(f"epoch-{seed}-{epoch}").shuffle(order)
        for index in order:
            yield texts[index]
