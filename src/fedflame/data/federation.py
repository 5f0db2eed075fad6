"""Turn the data configuration into clients: load, hold out, partition, tokenise. Needs no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from fedflame.config.run_config import RunConfig
from fedflame.config.sections import SKILLS, DataConfig
from fedflame.data import skills
from fedflame.data.conversations import Conversation
from fedflame.data.encoder import Encoder
from fedflame.data.encoding import EncodedPrompt, EncodedRow, encode_prompts, encode_rows, require_known_ids
from fedflame.data.given import GivenRows
from fedflame.data.partition import partition, partition_statistics
from fedflame.data.rows import LoadedRows, SkippedRow, read_rows, sample_rows, split_held_out, validation_rows
from fedflame.data.sources import open_source
from fedflame.errors import UserError
from fedflame.seeds import derive_seed

SKILLS_ROWS = 12000
"""Number of generated rows of skills if `data.max_rows` is 0."""


@dataclass(frozen=True)
class Federation:
    """The rows of every client, the held-out rows, and the rows that were skipped."""

    training: list[Conversation]
    parts: list[list[int]]
    """For each client, the indices of its rows in `training`."""
    partition: str
    """How the rows came to the clients: as `data.partition` says, or `given` with them by a program."""
    held_out: list[Conversation]
    """The rows of `evaluation.split`. The training rows are the same for both splits."""
    skipped: list[SkippedRow]
    columns: tuple[str, ...] = ()
    """For each source of rows, its columns: what was read as what, and what was ignored."""

    @property
    def digest(self) -> str:
        """A hash of all rows, training before held-out."""
        rows = [row.to_values() for row in [*self.training, *self.held_out]]
        return hashlib.blake2b(json.dumps(rows).encode(), digest_size=16).hexdigest()

    @property
    def categories(self) -> list[str]:
        """The categories of the training rows, sorted."""
        return sorted({row.category for row in self.training})


@dataclass(frozen=True)
class EncodedFederation:
    """The rows of the federation as tokens."""

    federation: Federation
    """Without the rows that cannot be encoded, which are among its skipped ones."""

    clients: list[list[EncodedRow]]
    held_out: list[EncodedRow]
    prompts: list[EncodedPrompt]
    """What answers to the held-out rows are generated from; empty if none are generated."""

    @property
    def cut_prompts(self) -> int:
        """Number of prompts that were longer than the model's context has room for."""
        return sum(prompt.truncated for prompt in self.prompts)

    def require_known_ids(self, vocabulary: int, encoder: Encoder) -> None:
        """Raise UserError if a row or a prompt has a token that the model has no embedding for."""
        rows = [*(row for rows in self.clients for row in rows), *self.held_out]
        require_known_ids(rows, vocabulary, encoder)

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
        return sum(row.labelled for row in rows) / sum(len(row.ids) for row in rows)


def load_federation(config: RunConfig, given: GivenRows | None = None) -> Federation:
    """Load the rows and split them over the clients; the same configuration gives the same split.

    Args:
        config: names the data, the held-out rows and the partition.
        given: rows that replace those of `data.dataset_name`. Rows given per client are not partitioned.

    Raises:
        UserError: the data cannot be read or partitioned (see `read_rows` and `partition`), there are
            too few rows to hold some out, or a client has no rows left.
    """
    if given is not None and given.per_client:
        return _of_clients(config, given)
    load = _generated if given is None and config.data.dataset_name == SKILLS else _loaded
    training, held_out, skipped, columns = load(config, given)
    labels = [row.category for row in training]
    seed = derive_seed(config.seed, "partition")
    parts = partition(labels, config.clients.num_clients, config.data.partition, config.data.alpha, seed)
    return Federation(training, parts, config.data.partition, held_out, skipped, columns)


_Rows = tuple[list[Conversation], list[Conversation], list[SkippedRow], tuple[str, ...]]
"""Training rows, held-out rows, skipped rows, columns."""


def _generated(config: RunConfig, _: GivenRows | None) -> _Rows:
    count = config.evaluation.rows_per_category * len(skills.CATEGORIES)
    training = skills.instructions(config.data.max_rows or SKILLS_ROWS, config.seed, "train")
    if config.evaluation.split == "validation":
        return training, skills.validation_instructions(count, config.seed), [], ()
    return training, skills.instructions(count, config.seed, "held_out"), [], ()


def _loaded(config: RunConfig, given: GivenRows | None) -> _Rows:
    data = config.data
    source = (
        given.sources[0] if given else open_source(data.dataset_name, data.dataset_config_name, data.split)
    )
    loaded = read_rows(source, _columns(data))
    training, held_out = _held_out(config, loaded.rows)
    return training, held_out, loaded.skipped, (f"{source.name}: {loaded.columns}",)


def _of_clients(config: RunConfig, given: GivenRows) -> Federation:
    """Hold rows out of all clients' rows together; each client keeps the rest of its own rows."""
    loaded = [read_rows(source, _columns(config.data)) for source in given.sources]
    owners = {id(row): client for client, of in enumerate(loaded) for row in of.rows}
    training, held_out = _held_out(config, [row for of in loaded for row in of.rows])
    parts: list[list[int]] = [[] for _ in loaded]
    for index, row in enumerate(training):
        parts[owners[id(row)]].append(index)
    if not all(parts):
        source = given.sources[parts.index([])].name
        raise UserError(f"{source}: no row is left to train on after rows for evaluation were held out")
    skipped = [row for of in loaded for row in of.skipped]
    return Federation(training, parts, "given", held_out, skipped, _columns_of(given, loaded))


def _columns_of(given: GivenRows, loaded: Sequence[LoadedRows]) -> tuple[str, ...]:
    """Return the columns of each client's rows, once if they are all alike."""
    if len({of.columns for of in loaded}) == 1:
        return (f"data: {loaded[0].columns}",)
    return tuple(f"{source.name}: {of.columns}" for source, of in zip(given.sources, loaded, strict=True))


def _columns(data: DataConfig) -> dict[str, str]:
    roles = ("messages", "instruction", "context", "response", "category")
    return {role: getattr(data, f"{role}_field") for role in roles}


def _held_out(config: RunConfig, rows: list[Conversation]) -> tuple[list[Conversation], list[Conversation]]:
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
    federation: Federation, encoder: Encoder, most_prompt_tokens: int | None = None, generate: bool = False
) -> EncodedFederation:
    """Tokenise every row once. Rows that cannot be encoded are left out, and are skipped rows from then on.

    Args:
        federation: the rows.
        encoder: how they become tokens.
        most_prompt_tokens: the most tokens of a held-out prompt; None for no limit.
        generate: whether answers to the held-out rows will be generated.

    Raises:
        UserError: more than half of the rows cannot be encoded, or none of a client or none held out.
    """
    training = encode_rows(federation.training, encoder)
    held_out = encode_rows(federation.held_out, encoder)
    rows = [*federation.training, *federation.held_out]
    unusable = [
        SkippedRow(row.where or "a generated row", encoded)
        for row, encoded in zip(rows, [*training, *held_out], strict=True)
        if isinstance(encoded, str)
    ]
    if unusable:
        _refuse_many(unusable, len(rows))
        federation = _without(federation, training, held_out, unusable)
    kept = [row for row in training if not isinstance(row, str)]
    prompts = encode_prompts(federation.held_out, encoder, most_prompt_tokens) if generate else []
    return EncodedFederation(
        federation,
        [[kept[index] for index in part] for part in federation.parts],
        [row for row in held_out if not isinstance(row, str)],
        prompts,
    )


def _refuse_many(unusable: Sequence[SkippedRow], rows: int) -> None:
    """Raise UserError if more than half of the rows are of no use."""
    if 2 * len(unusable) <= rows:
        return
    first = unusable[0]
    cut = "data.max_length" in first.reason
    advice = "raise data.max_length" if cut else "change the rows, or name another data.chat_template_path"
    found = f"{len(unusable):,} of {rows:,} rows cannot be used"
    raise UserError(f"{found}; the first, {first.where}: {first.reason}; {advice}")


def _without(
    federation: Federation,
    training: Sequence[EncodedRow | str],
    held_out: Sequence[EncodedRow | str],
    unusable: Sequence[SkippedRow],
) -> Federation:
    """Return the federation without the rows that have a reason in place of their tokens."""
    numbers = {
        index: number
        for number, index in enumerate(
            index for index, row in enumerate(training) if not isinstance(row, str)
        )
    }
    parts = [[numbers[index] for index in part if index in numbers] for part in federation.parts]
    tested = [row for row, it in zip(federation.held_out, held_out, strict=True) if not isinstance(it, str)]
    if not tested or not all(parts):
        whose = "the held-out rows" if not tested else f"the rows of client {parts.index([])}"
        raise UserError(f"none of {whose} can be used; {unusable[0].where}: {unusable[0].reason}")
    return replace(
        federation,
        training=[federation.training[index] for index in numbers],
        parts=parts,
        held_out=tested,
        skipped=[*federation.skipped, *unusable],
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
