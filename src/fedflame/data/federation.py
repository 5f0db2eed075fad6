"""Turn the data configuration into clients: load, hold out, partition. Needs no torch."""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from fedflame.config.client_files import client_files
from fedflame.config.run_config import RunConfig
from fedflame.config.sections import SKILLS, DataConfig
from fedflame.data import skills
from fedflame.data.bounds import trained_parts
from fedflame.data.client_tests import split_test
from fedflame.data.conversations import Conversation
from fedflame.data.given import GivenRows, rows_of_files, rows_of_test_files
from fedflame.data.partition import by_owner, partition, partition_statistics
from fedflame.data.rows import LoadedRows, SkippedRow, read_rows, sample_rows, split_held_out, validation_rows
from fedflame.data.sources import open_source
from fedflame.errors import UserError, one_line
from fedflame.seeds import derive_seed

SKILLS_ROWS = 12000
"""Number of generated rows of skills if `data.max_rows` is 0."""


@dataclass(frozen=True)
class Federation:
    """The rows of every client, the held-out rows, and the rows that were skipped."""

    training: list[Conversation]
    parts: list[list[int]]
    """For each client, the indices of its rows in `training`. A client that owns no row has none."""
    partition: str
    """How the rows came to the clients: as `data.partition` says, or `given` with them."""
    held_out: list[Conversation]
    """The rows of `evaluation.split`, or all of `evaluation.dataset_name`. The training rows are the same for
    both splits."""
    skipped: list[SkippedRow]
    columns: tuple[str, ...] = ()
    """For each source of rows, its columns: what was read as what, and what was ignored."""
    names: tuple[str, ...] = ()
    """Of the clients, if the data names them."""
    tests: tuple[list[Conversation], ...] = ()
    """For each client, the rows that it is scored on; empty if no client is asked to score."""

    @property
    def digest(self) -> str:
        """A hash of all rows: those of training, then the held-out ones, then those that clients score."""
        scored = [row for rows in self.tests for row in rows]
        rows = [row.to_values() for row in [*self.training, *self.held_out, *scored]]
        return hashlib.blake2b(json.dumps(rows).encode(), digest_size=16).hexdigest()

    @property
    def categories(self) -> list[str]:
        """The categories of the training rows, sorted."""
        return sorted({row.category for row in self.training})


@dataclass(frozen=True)
class _Rows:
    """What was read, before it is split over the clients."""

    training: list[Conversation]
    held_out: list[Conversation]
    skipped: list[SkippedRow]
    columns: tuple[str, ...]
    owners: tuple[str, ...] = ()
    """The values of `Conversation.owner` in client order; empty where rows have no owner."""
    names: tuple[str, ...] = ()


def load_federation(config: RunConfig, given: GivenRows | None = None) -> Federation:
    """Load the rows and split them over the clients; the same configuration gives the same split.

    Args:
        config: names the data, the held-out rows and the partition.
        given: rows that replace those of `data`. Rows given per client are not partitioned.

    Raises:
        UserError: the data cannot be read or partitioned (see `read_rows` and `partition`), or there are
            too few rows to hold some out.
    """
    data = config.data
    if given is None and data.client_files:
        given = rows_of_files(data.client_files)
    if given is None and data.dataset_name == SKILLS:
        rows = _generated(config)
    else:
        rows = _loaded(config, given or _only(data))
    federation = Federation(
        rows.training, _parts(config, rows), "given" if rows.owners else data.partition, rows.held_out,
        rows.skipped, rows.columns, rows.names,
    )  # fmt: skip
    federation = _capped(federation, config)
    federation = _with_tests(federation, config) if config.evaluating_clients() else federation
    if data.trained_by == "each":
        return federation
    parts = trained_parts(federation.parts, data.trained_by)
    if not any(parts):
        raise UserError(f"data.trained_by = {data.trained_by}: this client has no row to train on")
    return _with_parts(federation, parts)


def held_out_rows(config: RunConfig) -> LoadedRows:
    """Return all rows of `evaluation.dataset_name`.

    Raises:
        UserError: they are the rows that are trained on, or cannot be read; see `read_rows`.
    """
    name, split = config.evaluation.dataset_name, config.evaluation.dataset_split
    _refuse_trained_rows(config)
    source = open_source(name, config.data.dataset_config_name, split, "evaluation.dataset_name")
    loaded = read_rows(source, _columns(config.data))
    return replace(loaded, columns=f"{source.name}: {loaded.columns}")


def _refuse_trained_rows(config: RunConfig) -> None:
    data, name = config.data, config.evaluation.dataset_name
    trained = client_files(data.client_files) if data.client_files else (data.dataset_name,)
    same_place = any(os.path.realpath(one) == os.path.realpath(name) for one in trained)
    if same_place and (os.path.exists(name) or data.split == config.evaluation.dataset_split):
        raise UserError(
            f"evaluation.dataset_name = {name!r}: these rows are trained on; name others, or leave it out to "
            "score the rows that are held out of them"
        )


def held_out_only(config: RunConfig) -> Federation:
    """Load the rows of `evaluation.dataset_name` alone; see `held_out_rows`."""
    test = held_out_rows(config)
    return Federation([], [], "given", test.rows, test.skipped, (test.columns,))


def _generated(config: RunConfig) -> _Rows:
    evaluation = config.evaluation
    count = evaluation.rows_per_category * len(skills.CATEGORIES)
    training = skills.instructions(config.data.max_rows or SKILLS_ROWS, config.seed, "train")
    if config.data.client_field:
        raise UserError(f"data.client_field = {config.data.client_field!r}: generated rows name no client")
    if evaluation.dataset_name:
        test = held_out_rows(config)
        return _Rows(training, test.rows, test.skipped, (test.columns,))
    if evaluation.split == "validation":
        return _Rows(training, skills.validation_instructions(count, config.seed), [], ())
    return _Rows(training, skills.instructions(count, config.seed, "held_out"), [], ())


def _only(data: DataConfig) -> GivenRows:
    return GivenRows(
        (open_source(data.dataset_name, data.dataset_config_name, data.split),), per_client=False
    )


def _loaded(config: RunConfig, given: GivenRows) -> _Rows:
    """Read all sources. Rows are held out of them together, unless rows of their own are scored."""
    data = config.data
    loaded = [read_rows(source, _columns(data), may_be_empty=given.per_client) for source in given.sources]
    if given.per_client:
        loaded = [of.owned_by(str(client)) for client, of in enumerate(loaded)]
    rows, skipped = ([row for of in loaded for row in getattr(of, part)] for part in ("rows", "skipped"))
    if not rows:
        raise UserError(f"{given.sources[0].name} and {len(given.sources) - 1} more: no usable row in any")
    owners, names = _owners(config, given, rows)
    columns = _columns_of(given, loaded)
    if config.evaluation.dataset_name:
        test, training = held_out_rows(config), sample_rows(rows, data.max_rows, config.seed)
        return _Rows(training, test.rows, [*skipped, *test.skipped], (*columns, test.columns), owners, names)
    training, held_out = _held_out(config, rows)
    if owners:
        training, held_out = _with_a_row_for_each(training, held_out)
    return _Rows(training, held_out, skipped, columns, owners, names)


def _owners(
    config: RunConfig, given: GivenRows, rows: Sequence[Conversation]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return who owns rows, in client order, and the clients' names."""
    if given.per_client:
        return tuple(map(str, range(len(given.sources)))), given.names
    if not (field := config.data.client_field):
        return (), ()
    owners = sorted({row.owner for row in rows})
    if len(owners) != config.clients.num_clients:
        first = ", ".join(repr(one_line(owner)[:30]) for owner in owners[:3])
        raise UserError(
            f"data.client_field = {field!r}: the rows name {len(owners):,} clients ({first}"
            f"{', ...' if len(owners) > 3 else ''}); set clients.num_clients = {len(owners)}"
        )
    return tuple(owners), tuple(one_line(owner) for owner in owners)


def _with_a_row_for_each(
    training: list[Conversation], held_out: list[Conversation]
) -> tuple[list[Conversation], list[Conversation]]:
    """Give held-out rows back to a client that would have no other, with their copies.

    Raises:
        UserError: no row is left to hold out.
    """
    without = {row.owner for row in held_out} - {row.owner for row in training}
    back = {row.content for row in held_out if row.owner in without}
    kept = [row for row in held_out if row.content not in back]
    if not kept:
        raise UserError("too few rows to hold some out for evaluation and leave each client one")
    return [*training, *(row for row in held_out if row.content in back)], kept


def _parts(config: RunConfig, rows: _Rows) -> list[list[int]]:
    if rows.owners:
        return by_owner([row.owner for row in rows.training], rows.owners)
    labels, data = [row.category for row in rows.training], config.data
    seed = derive_seed(config.seed, "partition")
    return partition(labels, config.clients.num_clients, data.partition, data.alpha, seed)


def _capped(federation: Federation, config: RunConfig) -> Federation:
    """Leave each client a seeded sample of at most `data.max_rows_per_client` rows."""
    most = config.data.max_rows_per_client
    if not most or all(len(part) <= most for part in federation.parts):
        return federation
    kept = [
        sorted(random.Random(derive_seed(config.seed, "cap", client)).sample(part, min(most, len(part))))
        for client, part in enumerate(federation.parts)
    ]
    return _with_parts(federation, kept)


def _with_parts(federation: Federation, kept: Sequence[Sequence[int]]) -> Federation:
    """Return the federation with these of its training rows, by client."""
    used = sorted(index for part in kept for index in part)
    numbers = {index: number for number, index in enumerate(used)}
    return replace(
        federation,
        training=[federation.training[index] for index in used],
        parts=[[numbers[index] for index in part] for part in kept],
    )


def _with_tests(federation: Federation, config: RunConfig) -> Federation:
    """Give each client the rows of its own file to score, or hold some of its rows out for it."""
    if config.data.client_test_files:
        return _with_given_tests(federation, config.data)
    size, training = config.evaluation.client_test_size, federation.training
    kept: list[list[int]] = []
    tests: list[list[Conversation]] = []
    for part in federation.parts:
        trained, scored = split_test([training[index] for index in part], size, config.seed)
        kept.append([part[at] for at in trained])
        tests.append([training[part[at]] for at in scored])
    return replace(_with_parts(federation, kept), tests=tuple(tests))


def _with_given_tests(federation: Federation, data: DataConfig) -> Federation:
    sources = rows_of_test_files(data.client_test_files, data.client_files)
    loaded = [read_rows(source, _columns(data), may_be_empty=True) for source in sources]
    skipped = [row for of in loaded for row in of.skipped]
    tests = tuple(of.rows for of in loaded)
    return replace(federation, tests=tests, skipped=[*federation.skipped, *skipped])


def _columns_of(given: GivenRows, loaded: Sequence[LoadedRows]) -> tuple[str, ...]:
    """Return the columns of each client's rows, once if they are all alike."""
    if len(loaded) > 1 and len({of.columns for of in loaded}) == 1:
        return (f"data: {loaded[0].columns}",)
    return tuple(f"{source.name}: {of.columns}" for source, of in zip(given.sources, loaded, strict=True))


def _columns(data: DataConfig) -> dict[str, str]:
    roles = ("messages", "instruction", "context", "response", "category", "client")
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


def describe(federation: Federation, tiers: Sequence[int]) -> list[dict[str, Any]]:
    """Return for each client its k, its number of rows, its rows per category, and its name if it has one.

    Where clients score rows of their own, it has the number of these, too.
    """
    labels = [row.category for row in federation.training]
    statistics = partition_statistics(labels, federation.parts)
    names = [{"name": name} for name in federation.names] or [{}] * len(federation.parts)
    tests = [{"test_rows": len(rows)} for rows in federation.tests] or [{}] * len(federation.parts)
    return [
        {
            "client": client,
            "active_experts": k,
            "rows": len(part),
            "per_category": per_category,
            **names[client],
            **tests[client],
        }
        for client, (k, part, per_category) in enumerate(
            zip(tiers, federation.parts, statistics, strict=True)
        )
    ]
