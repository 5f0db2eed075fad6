"""Turn the data configuration into clients: load, hold out, partition, tokenise. Needs no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING, Any

from fedflame.config.run_config import RunConfig
from fedflame.config.sections import SKILLS, DataConfig
from fedflame.data import skills
from fedflame.data.encoding import EncodedRow, encode_rows
from fedflame.data.given import GivenRows
from fedflame.data.instructions import (
    Instruction,
    SkippedRow,
    read_instructions,
    sample_rows,
    split_held_out,
    validation_rows,
)
from fedflame.data.partition import partition, partition_statistics
from fedflame.data.sources import open_source
from fedflame.errors import UserError
from fedflame.seeds import derive_seed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SKILLS_ROWS = 12000
"""Number of generated rows of skills if `data.max_rows` is 0."""


@dataclass(frozen=True)
class Federation:
    """The rows of every client, the held-out rows, and the rows that were skipped."""

    training: list[Instruction]
    parts: list[list[int]]
    """For each client, the indices of its rows in `training`."""
    partition: str
    """How the rows came to the clients: as `data.partition` says, or `given` with them by a program."""
    held_out: list[Instruction]
    """The rows of `evaluation.split`. The training rows are the same for both splits."""
    skipped: list[SkippedRow]

    @property
    def digest(self) -> str:
        """A hash of all rows, training before held-out."""
        rows = [astuple(row) for row in [*self.training, *self.held_out]]
        return hashlib.blake2b(json.dumps(rows).encode(), digest_size=16).hexdigest()

    @property
    def categories(self) -> list[str]:
        """The categories of the training rows, sorted."""
        return sorted({row.category for row in self.training})


@dataclass(frozen=True)
class EncodedFederation:
    """The rows of the federation as tokens."""

    clients: list[list[EncodedRow]]
    held_out: list[EncodedRow]

    @property
    def truncated(self) -> int:
        """Number of rows, training and held-out, that were longer than `data.max_length`."""
        return sum(row.truncated for rows in [*self.clients, self.held_out] for row in rows)

    @property
    def mean_length(self) -> int:
        """Mean tokens per training row, rounded."""
        lengths = [len(row.ids) for rows in self.clients for row in rows]
        return round(sum(lengths) / len(lengths))

    @property
    def labelled_share(self) -> float:
        """Share of the training tokens that have a label; only there is the output embedding applied."""
        rows = [row for client in self.clients for row in client]
        labelled = sum(len(row.ids) - row.prompt_length for row in rows)
        return labelled / sum(len(row.ids) for row in rows)


def load_federation(config: RunConfig, given: GivenRows | None = None) -> Federation:
    """Load the rows and split them over the clients; the same configuration gives the same split.

    Args:
        config: names the data, the held-out rows and the partition.
        given: rows that replace those of `data.dataset_name`. Rows given per client are not partitioned.

    Raises:
        UserError: the data cannot be read or partitioned (see `read_instructions` and `partition`), there are
            too few rows to hold some out, or a client has no rows left.
    """
    if given is not None and given.per_client:
        return _of_clients(config, given)
    load = _generated if given is None and config.data.dataset_name == SKILLS else _loaded
    training, held_out, skipped = load(config, given)
    labels = [row.category for row in training]
    seed = derive_seed(config.seed, "partition")
    parts = partition(labels, config.clients.num_clients, config.data.partition, config.data.alpha, seed)
    return Federation(training, parts, config.data.partition, held_out, skipped)


_Rows = tuple[list[Instruction], list[Instruction], list[SkippedRow]]
"""Training rows, held-out rows, skipped rows."""


def _generated(config: RunConfig, _: GivenRows | None) -> _Rows:
    count = config.evaluation.rows_per_category * len(skills.CATEGORIES)
    training = skills.instructions(config.data.max_rows or SKILLS_ROWS, config.seed, "train")
    if config.evaluation.split == "validation":
        return training, skills.validation_instructions(count, config.seed), []
    return training, skills.instructions(count, config.seed, "held_out"), []


def _loaded(config: RunConfig, given: GivenRows | None) -> _Rows:
    data = config.data
    source = (
        given.sources[0] if given else open_source(data.dataset_name, data.dataset_config_name, data.split)
    )
    loaded = read_instructions(source, _columns(data))
    training, held_out = _held_out(config, loaded.rows)
    return training, held_out, loaded.skipped


def _of_clients(config: RunConfig, given: GivenRows) -> Federation:
    """Hold rows out of all clients' rows together; each client keeps the rest of its own rows."""
    loaded = [read_instructions(source, _columns(config.data)) for source in given.sources]
    owners = {id(row): client for client, of in enumerate(loaded) for row in of.rows}
    training, held_out = _held_out(config, [row for of in loaded for row in of.rows])
    parts: list[list[int]] = [[] for _ in loaded]
    for index, row in enumerate(training):
        parts[owners[id(row)]].append(index)
    if not all(parts):
        source = given.sources[parts.index([])].name
        raise UserError(f"{source}: no row is left to train on after rows for evaluation were held out")
    return Federation(training, parts, "given", held_out, [row for of in loaded for row in of.skipped])


def _columns(data: DataConfig) -> dict[str, str]:
    roles = ("instruction", "context", "response", "category")
    return {role: getattr(data, f"{role}_field") for role in roles}


def _held_out(config: RunConfig, rows: list[Instruction]) -> tuple[list[Instruction], list[Instruction]]:
    """Return training rows and rows of `evaluation.split`; they are the objects in `rows`, not copies."""
    data, seed = config.data, config.seed
    sample = sample_rows(rows, data.max_rows, seed)
    training, test = split_held_out(sample, config.evaluation.rows_per_category, seed)
    if not test:
        raise UserError(
            f"{data.dataset_name}: {len(training)} usable rows; too few to hold some out for evaluation"
        )
    if config.evaluation.split == "test":
        return training, test
    validation = validation_rows(rows, sample, test, seed)
    if not validation:
        raise UserError(
            f"{data.dataset_name}: {len(rows)} usable rows; data.max_rows = {data.max_rows} "
            "must leave some of them for evaluation.split = 'validation'"
        )
    return training, validation


def encode_federation(
    federation: Federation, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> EncodedFederation:
    """Tokenise every row once."""
    training = encode_rows(federation.training, tokenizer, max_length)
    return EncodedFederation(
        [[training[index] for index in part] for part in federation.parts],
        encode_rows(federation.held_out, tokenizer, max_length),
    )


def describe(federation: Federation, tiers: Sequence[int]) -> list[dict[str, Any]]:
    """Return for each client its k, its number of rows and its rows per category."""
    labels = [row.category for row in federation.training]
    statistics = partition_statistics(labels, federation.parts)
    return [
        {"client": client, "active_experts": k, "rows": len(part), "per_category": per_category}
        for client, (k, part, per_category) in enumerate(
            zip(tiers, federation.parts, statistics, strict=True)
        )
    ]
