"""The pre-training text: openly licensed files mixed with generated skills statements."""

from __future__ import annotations

import gzip
import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from skills_text import DENSE_WRITERS, HARD_WRITERS, dense_documents, documents

VOCABULARY_SIZE = 4096
PAD, END = "<|padding|>", "<|endoftext|>"
# Dolly is the federated task and the Alpaca family is CC BY-NC: neither may be listed here.
OPEN_FILES = {
    "p3-open-slice.jsonl.gz": ("instruction", "input", "output"),
    "gsm8k-train.jsonl.gz": ("question", "answer"),
    "gpteacher-codegen-4k.jsonl.gz": ("instruction", "input", "output"),
    "books-cc0.jsonl.gz": ("text",),
    "tldr-commands.jsonl.gz": ("instruction", "input", "output"),
}
DENSE_FROM_STEP = 4000
"""Before this step the skills text is `documents`, from it on `documents` and `dense_documents`."""
HARD_FROM_STEP = 12_800
"""From this step on `dense_documents` are by `HARD_WRITERS`."""
SKILLS_SHARE, DENSE_SHARE = 0.4, 0.6
"""Share of the training tokens that are skills text, before and from `DENSE_FROM_STEP`."""


def read_open_text(folder: Path) -> list[str]:
    """One document per row of `OPEN_FILES`, fields on lines of their own, in file order."""
    texts = []
    for name, fields in OPEN_FILES.items():
        with gzip.open(folder / name, "rt", encoding="utf-8") as lines:
            for line in lines:
                row = json.loads(line)
                parts = (row[field].replace(END, "").strip() for field in fields)
                texts.append("\n".join(part for part in parts if part))
    return texts


def split_validation(texts: list[str], seed: int) -> tuple[list[str], list[str]]:
    """A seeded shuffle, cut into (training, validation) with one hundredth for validation."""
    shuffled = list(texts)
    random.Random(f"validation-{seed}").shuffle(shuffled)
    cut = len(shuffled) // 100
    return shuffled[cut:], shuffled[:cut]


def train_tokenizer(texts: list[str], seed: int) -> Tokenizer:
    """Byte-level BPE with single digits, trained on the mix that the model will see."""
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


def token_stream(tokenizer: Tokenizer, texts: list[str], seed: int) -> Iterator[int]:
    """Endless token ids for the first steps: open text and statements in `SKILLS_SHARE`."""
    return _mix(tokenizer, _epochs(texts, seed), documents(seed + 1), SKILLS_SHARE)


def dense_token_stream(tokenizer: Tokenizer, texts: list[str], seed: int) -> Iterator[int]:
    """Endless token ids from `DENSE_FROM_STEP` on: open text and dense paragraphs in `DENSE_SHARE`."""
    skills = _dense_and_single(dense_documents(seed, DENSE_WRITERS), documents(seed + 11))
    return _mix(tokenizer, _epochs(texts, seed + 10), skills, DENSE_SHARE)


def hard_token_stream(tokenizer: Tokenizer, texts: list[str], seed: int) -> Iterator[int]:
    """Endless token ids from `HARD_FROM_STEP` on: the same by `HARD_WRITERS`."""
    skills = _dense_and_single(dense_documents(seed + 20, HARD_WRITERS), documents(seed + 21))
    return _mix(tokenizer, _epochs(texts, seed + 20), skills, DENSE_SHARE)


def _dense_and_single(dense: Iterator[str], single: Iterator[str]) -> Iterator[str]:
    """One document in six is of single statements, which have wordings of their own."""
    return (next(single) if number % 6 == 0 else next(dense) for number in itertools.count())


def _mix(tokenizer: Tokenizer, general: Iterator[str], skills: Iterator[str], share: float) -> Iterator[int]:
    end = tokenizer.token_to_id(END)
    assert end is not None, "the trainer was given END as a special token"
    skills_tokens = total_tokens = 0
    while True:
        is_skills = skills_tokens <= share * total_tokens
        ids = [*tokenizer.encode(next(skills) if is_skills else next(general)).ids, end]
        skills_tokens += len(ids) * is_skills
        total_tokens += len(ids)
        yield from ids


def _epochs(texts: list[str], seed: int) -> Iterator[str]:
    for epoch in itertools.count():
        order = list(range(len(texts)))
        random.Random(f"epoch-{seed}-{epoch}").shuffle(order)
        for index in order:
            yield texts[index]
