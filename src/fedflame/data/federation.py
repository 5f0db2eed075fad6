"""From the data configuration to clients: load, hold out, partition, tokenise."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from fedflame.config import SKILLS, RunConfig
from fedflame.data import skills
from fedflame.data.batches import EncodedRow, encode
from fedflame.data.instructions import (
    Instruction,
    SkippedRow,
    load_instructions,
    sample_rows,
    split_held_out,
    validation_rows,
)
from fedflame.data.partition import partition, partition_statistics
from fedflame.errors import UserError
from fedflame.seeds import derive_seed

SKILLS_ROWS = 12000
"""Rows of generated skills where `data.max_rows` says nothing."""


@dataclass(frozen=True)
class Federation:
    """Every client's rows, the held-out rows, and what was skipped on the way."""

    training: list[Instruction]
    parts: list[list[int]]
    """Indices into `training` per client."""
    held_out: list[Instruction]
    """Of `evaluation.split`; the training rows are the same for either."""
    skipped: list[SkippedRow]

    @property
    def digest(self) -> str:
        """A hash of every row, training before held-out."""
        rows = [astuple(row) for row in [*self.training, *self.held_out]]
        return hashlib.blake2b(json.dumps(rows).encode(), digest_size=16).hexdigest()

    @property
    def categories(self) -> list[str]:
        """The labels of the training rows."""
        return sorted({row.category for row in self.training})


@dataclass(frozen=True)
class EncodedFederation:
    """The federation in tokens."""

    clients: list[list[EncodedRow]]
    held_out: list[EncodedRow]

    @property
    def truncated(self) -> int:
        """Rows, training and held-out, that were longer than `data.max_length`."""
        return sum(row.truncated for rows in [*self.clients, self.held_out] for row in rows)

    @property
    def mean_length(self) -> int:
        """Mean tokens per training row, rounded."""
        lengths = [len(row.ids) for rows in self.clients for row in rows]
        return round(sum(lengths) / len(lengths))

    @property
    def labelled_share(self) -> float:
        """Share of the training tokens that carry a label, where the head runs."""
        rows = [row for client in self.clients for row in client]
        labelled = sum(len(row.ids) - row.prompt_length for row in rows)
        return labelled / sum(len(row.ids) for row in rows)


def load_federation(config: RunConfig) -> Federation:
    """Rows split over the clients as configured; the same configuration gives the same split.

    Raises:
        UserError: see `load_instructions`, `validation_instructions` and `partition`; or no rows to hold out.
    """
    load = _generated if config.data.dataset_name == SKILLS else _loaded
    training, held_out, skipped = load(config)
    labels = [row.category for row in training]
    seed = derive_seed(config.seed, "partition")
    parts = partition(labels, config.clients.num_clients, config.data.partition, config.data.alpha, seed)
    return Federation(training, parts, held_out, skipped)


_Rows = tuple[list[Instruction], list[Instruction], list[SkippedRow]]
"""To train on, held out, and skipped."""


def _generated(config: RunConfig) -> _Rows:
    count = config.evaluation.rows_per_category * len(skills.CATEGORIES)
    training = skills.instructions(config.data.max_rows or SKILLS_ROWS, config.seed, "train")
    if config.evaluation.split == "validation":
        return training, skills.validation_instructions(count, config.seed), []
    return training, skills.instructions(count, config.seed, "held_out"), []


def _loaded(config: RunConfig) -> _Rows:
    data, seed = config.data, config.seed
    loaded = load_instructions(
        dataset_name=data.dataset_name,
        split=data.split,
        dataset_config_name=data.dataset_config_name,
        instruction_field=data.instruction_field,
        context_field=data.context_field,
        response_field=data.response_field,
        category_field=data.category_field,
    )
    sample = sample_rows(loaded.rows, data.max_rows, seed)
    training, test = split_held_out(sample, config.evaluation.rows_per_category, seed)
    if not test:
        raise UserError(
            f"{data.dataset_name}: {len(training)} usable rows; too few to hold some out for evaluation"
        )
    if config.evaluation.split == "test":
        return training, test, loaded.skipped
    validation = validation_rows(loaded.rows, sample, test, seed)
    if not validation:
        raise UserError(
            f"{data.dataset_name}: {len(loaded.rows)} usable rows; data.max_rows = {data.max_rows} "
            "must leave some of them for evaluation.split = 'validation'"
        )
    return training, validation, loaded.skipped


def encode_federation(
    federation: Federation, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> EncodedFederation:
    """Tokenise every row once."""
    training = [encode(row, tokenizer, max_length) for row in federation.training]
    return EncodedFederation(
        [[training[index] for index in part] for part in federation.parts],
        [encode(row, tokenizer, max_length) for row in federation.held_out],
    )


def describe(federation: Federation, tiers: Sequence[int]) -> list[dict[str, Any]]:
    """Per client: its k, its rows and its rows per category."""
    labels = [row.category for row in federation.training]
    statistics = partition_statistics(labels, federation.parts)
    return [
        {"client": client, "active_experts": k, "rows": len(part), "per_category": per_category}
        for client, (k, part, per_category) in enumerate(
            zip(tiers, federation.parts, statistics, strict=True)
        )
    ]
