"""The rows of a federation as tokens. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from fedflame.data.client_tests import EncodedTests, encode_tests
from fedflame.data.encoder import Encoder
from fedflame.data.encoding import EncodedPrompt, EncodedRow, encode_prompts, encode_rows, require_known_ids
from fedflame.data.federation import Federation
from fedflame.data.rows import SkippedRow
from fedflame.errors import UserError


@dataclass(frozen=True)
class EncodedFederation:
    """The rows of the federation as tokens."""

    federation: Federation
    """Without the rows that cannot be encoded, which are among its skipped ones."""

    clients: list[list[EncodedRow]]
    held_out: list[EncodedRow]
    prompts: list[EncodedPrompt]
    """What answers to the held-out rows are generated from; empty if none are generated."""
    tests: list[EncodedTests]
    """For each client, the rows that it is scored on."""

    @property
    def cut_prompts(self) -> int:
        """Number of prompts that were longer than the model's context has room for."""
        return sum(prompt.truncated for prompt in self.prompts)

    def require_known_ids(self, vocabulary: int, encoder: Encoder) -> None:
        """Raise UserError if a row or a prompt has a token that the model has no embedding for."""
        tests = [tests.encoded for tests in self.tests]
        rows = [*(row for rows in [*self.clients, *tests] for row in rows), *self.held_out]
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


def encode_federation(
    federation: Federation, encoder: Encoder, most_prompt_tokens: int | None = None, generate: bool = False
) -> EncodedFederation:
    """Tokenise every row once. Rows that cannot be encoded are left out, and are skipped rows from then on.

    Args:
        federation: the rows.
        encoder: how they become tokens.
        most_prompt_tokens: the most tokens of a prompt that is scored; None for no limit.
        generate: whether answers to the rows that are scored will be generated.

    Raises:
        UserError: more than half of the rows cannot be encoded, or none of a client or none held out.
    """
    training = encode_rows(federation.training, encoder)
    held_out = encode_rows(federation.held_out, encoder)
    tests = [encode_tests(of, encoder, most_prompt_tokens, generate) for of in federation.tests]
    rows = [*federation.training, *federation.held_out]
    unusable = [
        SkippedRow(row.where or "a generated row", encoded)
        for row, encoded in zip(rows, [*training, *held_out], strict=True)
        if isinstance(encoded, str)
    ]
    if unusable:
        _refuse_many(unusable, len(rows))
        federation = _without(federation, training, held_out, unusable)
    if skipped := [row for _, of in tests for row in of]:
        usable = tuple(of.rows for of, _ in tests)
        federation = replace(federation, tests=usable, skipped=[*federation.skipped, *skipped])
    kept = [row for row in training if not isinstance(row, str)]
    prompts = encode_prompts(federation.held_out, encoder, most_prompt_tokens) if generate else []
    return EncodedFederation(
        federation,
        [[kept[index] for index in part] for part in federation.parts],
        [row for row in held_out if not isinstance(row, str)],
        prompts,
        [of for of, _ in tests],
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
    emptied = [client for client, part in enumerate(federation.parts) if part and not parts[client]]
    if not tested or emptied:
        whose = f"the rows of client {emptied[0]}" if tested else "the held-out rows"
        raise UserError(f"none of {whose} can be used; {unusable[0].where}: {unusable[0].reason}")
    return replace(
        federation,
        training=[federation.training[index] for index in numbers],
        parts=parts,
        held_out=tested,
        skipped=[*federation.skipped, *unusable],
    )
