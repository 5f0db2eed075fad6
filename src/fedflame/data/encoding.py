"""Rows as token ids, of which only what the assistant says has labels. Needs no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from fedflame.data.conversations import Conversation
from fedflame.data.encoder import Encoder, Tokens, tokenise
from fedflame.data.messages import BrokenRowError
from fedflame.data.speech import find_asked, find_speech
from fedflame.errors import UserError

PROMPT_SHARE = 4
"""A prompt that is cut keeps at least one of so many tokens of a row, or the answer answers nothing."""


@dataclass(frozen=True)
class EncodedRow:
    """Token ids of a row. The first `prompt_length` tokens have no loss, nor have those of `gaps`."""

    ids: list[int]
    prompt_length: int
    truncated: bool
    gaps: tuple[tuple[int, int], ...] = ()
    """Stretches after the prompt, each from its first token to the one after its last."""

    @property
    def labelled(self) -> int:
        """The number of tokens that have a label."""
        return len(self.ids) - self.prompt_length - sum(stop - start for start, stop in self.gaps)


def encode_rows(rows: Sequence[Conversation], encoder: Encoder) -> list[EncodedRow | str]:
    """Return each row as at most `max_length` tokens, or the reason why it cannot be used.

    Of a row that is too long the oldest turns go first, but for the system's; then the beginning of what the
    last user says, first of its context; then, of an answer that takes more than three quarters, the end.

    Raises:
        UserError: the tokenizer has no eos_token.
    """
    if rows:
        _ = encoder.end_token
    texts = [_text(row, encoder) for row in rows]
    tokenised = iter(tokenise([text for text, reason in texts if not reason], encoder))
    return [
        reason or _encoded(row, text, next(tokenised), encoder)
        for row, (text, reason) in zip(rows, texts, strict=True)
    ]


def encode(row: Conversation, encoder: Encoder) -> EncodedRow:
    """Encode one row; see `encode_rows`. Raises UserError with the reason if it cannot be used."""
    (encoded,) = encode_rows([row], encoder)
    if isinstance(encoded, str):
        raise UserError(f"{row.where}: {encoded}")
    return encoded


@dataclass(frozen=True)
class EncodedPrompt:
    """What an answer is generated from."""

    ids: list[int]
    truncated: bool


def encode_prompts(rows: Sequence[Conversation], encoder: Encoder, most: int | None) -> list[EncodedPrompt]:
    """Return for each row what its last answer is generated from, at most `most` tokens; None for no limit.

    A prompt that is too long loses what a row loses that is too long; see `encode_rows`.

    Raises:
        UserError: the template does not take the turns before an answer, or writes nothing of them.
    """
    try:
        texts = [_prompt_text(row, encoder) for row in rows]
    except BrokenRowError as error:
        raise UserError(f"no answer to a held-out row can be generated: {error}") from error
    if not all(texts):
        raise UserError("no answer can be generated: the chat template writes nothing in front of it")
    return [
        _fitted_prompt(row, tokens, encoder, most)
        for row, tokens in zip(rows, tokenise(texts, encoder), strict=True)
    ]


def _prompt_text(row: Conversation, encoder: Encoder) -> str:
    return encoder.template.render(row.turns[:-1], row.tools, prompt=True)


def _fitted_prompt(row: Conversation, tokens: Tokens, encoder: Encoder, most: int | None) -> EncodedPrompt:
    start = encoder.beginning
    if most is None or len(start) + len(tokens.ids) <= most:
        return EncodedPrompt([*start, *tokens.ids], False)
    shorter, text, tokens = _shortened(row, most - len(start), _prompt_text, encoder)
    asked = [index + len(start) for index in tokens.within(find_asked(text, shorter.turns, len(text)))]
    ids = [*start, *tokens.ids]
    gone = _to_cut(asked, len(ids), len(ids) - most, _kept_at_first(ids, encoder))
    return EncodedPrompt([id for index, id in enumerate(ids) if index not in gone], True)


def _row_text(row: Conversation, encoder: Encoder) -> str:
    return encoder.template.render(row.turns, row.tools)


def _text(row: Conversation, encoder: Encoder) -> tuple[str, str]:
    """Return the text of a row, or nothing and the reason why it has none."""
    try:
        return _row_text(row, encoder), ""
    except BrokenRowError as error:
        return "", str(error)


def _encoded(row: Conversation, text: str, tokens: Tokens, encoder: Encoder) -> EncodedRow | str:
    """Find the labels of a row, and cut it if it is too long; see `encode_rows`."""
    most = encoder.max_length
    try:
        if len(encoder.beginning) + len(tokens.ids) <= most:
            whole = _labelled(row, text, tokens, encoder)
            if len(whole.ids) <= most:
                return _row(whole, encoder)
        room = most - len(encoder.beginning) - (not encoder.ends(text))
        shorter, text, tokens = _shortened(row, room, _row_text, encoder)
        whole = _labelled(shorter, text, tokens, encoder)
        shift = len(encoder.beginning)
        asked = [index + shift for index in tokens.within(find_asked(text, shorter.turns, whole.start))]
        return _row(_cut(whole, asked, encoder), encoder, truncated=True)
    except BrokenRowError as error:
        return str(error)


@dataclass(frozen=True)
class _Labelled:
    """A row as tokens, with the labels that it has."""

    ids: list[int]
    labels: list[bool]
    answer: int
    """The token at which the assistant's first turn begins that has loss."""
    start: int
    """The same place in the text."""


def _labelled(row: Conversation, text: str, tokens: Tokens, encoder: Encoder) -> _Labelled:
    """Find which tokens have labels; add what the tokenizer puts before, and an end if the text has none."""
    completion_only = encoder.completion_only(row)
    speech = find_speech(row, text, encoder.template, encoder.special, completion_only)
    first, last, beginning = speech[0], speech[-1], encoder.beginning
    answer = tokens.first_after(first.start)
    if encoder.assistant_only_loss:
        said = ((it.start, it.end if encoder.train_on_eos else it.closing) for it in speech)
        chosen = set(tokens.within(said))
    else:
        chosen = set(range(answer if completion_only else 0, len(tokens.ids)))
    labels = [False] * len(beginning) + [index in chosen for index in range(len(tokens.ids))]
    opens = encoder.train_on_eos and not last.is_closed and last.end >= len(text.rstrip())
    end = [encoder.end_token] if opens else []
    ids, labels = [*beginning, *tokens.ids, *end], labels + [True] * len(end)
    return _Labelled(ids, labels, answer + len(beginning), first.start)


def _shortened(
    row: Conversation, room: int, text_of: Callable[[Conversation, Encoder], str], encoder: Encoder
) -> tuple[Conversation, str, Tokens]:
    """Return a row without so many of its oldest turns that it fits, or the shortest there is.

    The system's turn goes only where what is left does not fit even without what the user asks.
    """

    def tried(shorter: Conversation) -> tuple[Conversation, str, Tokens]:
        text = text_of(shorter, encoder)
        return shorter, text, tokenise([text], encoder)[0]

    candidates = _shorter(row)
    low, high = 0, len(candidates) - 1
    while low < high:  # the later a candidate begins, the shorter it is
        middle = (low + high) // 2
        low, high = (low, middle) if len(tried(candidates[middle])[2].ids) <= room else (middle + 1, high)
    shorter, text, tokens = tried(candidates[low])
    asked = tokens.within(find_asked(text, shorter.turns, len(text)))
    if shorter.turns[0].role == "system" and len(tokens.ids) - len(asked) > room:
        without = replace(shorter, turns=shorter.turns[1:], completion=max(0, shorter.completion - 1))
        return tried(without)
    return shorter, text, tokens


def _shorter(row: Conversation) -> list[Conversation]:
    """Return the row, and the row from each later turn of a user on; the system's turn stays before them."""
    system = row.turns[:1] if row.turns[0].role == "system" else ()
    users = [index for index, turn in enumerate(row.turns) if turn.role == "user"]
    return [row] + [
        replace(
            row,
            turns=(*system, *row.turns[start:]),
            completion=max(0, row.completion - (start - len(system))),
        )
        for start in users[1:]
    ]


def _cut(row: _Labelled, asked: Sequence[int], encoder: Encoder) -> _Labelled:
    """Cut what the user asks from its left, then the prompt from its left, then the answer from its right."""
    most, answer = encoder.max_length, len(row.ids) - row.answer
    room = max(most - answer, min(row.answer, most // PROMPT_SHARE))
    gone = _to_cut(asked, row.answer, row.answer - room, _kept_at_first(row.ids, encoder))
    kept = [index for index in range(len(row.ids)) if index not in gone][:most]
    ids, labels = [row.ids[index] for index in kept], [row.labels[index] for index in kept]
    return replace(row, ids=ids, labels=labels, answer=row.answer - len(gone))


def _kept_at_first(ids: Sequence[int], encoder: Encoder) -> int:
    """Return how many tokens at the left go last: what the tokenizer puts there, or the template's BOS."""
    return len(encoder.beginning) or int(ids[0] == encoder.tokenizer.bos_token_id)


def _to_cut(asked: Sequence[int], stop: int, count: int, keep: int) -> set[int]:
    """Return the indices of `count` tokens before `stop`: those that are asked, then from the left.

    The first `keep` go last.
    """
    others = sorted(set(range(stop)) - set(asked))
    return set([*asked, *others[keep:], *others[:keep]][: max(0, count)])


def _row(row: _Labelled, encoder: Encoder, truncated: bool = False) -> EncodedRow | str:
    if not any(row.labels[1:]):
        return f"no token of the assistant is left within data.max_length = {encoder.max_length}"
    prompt = row.labels.index(True)
    gaps, place = [], prompt
    for labelled, stretch in groupby(row.labels[prompt:]):
        stop = place + len(list(stretch))
        if not labelled:
            gaps.append((place, stop))
        place = stop
    return EncodedRow(row.ids, prompt, truncated, tuple(gaps))


@dataclass(frozen=True)
class Shown:
    """Successive tokens of a row as text; all of them have loss, or none."""

    text: str
    has_loss: bool


def shown_row(row: EncodedRow, encoder: Encoder) -> tuple[Shown, ...]:
    """Return a row as it is trained on."""
    loss = [index >= row.prompt_length for index in range(len(row.ids))]
    for start, stop in row.gaps:
        loss[start:stop] = [False] * (stop - start)
    parts = groupby(zip(row.ids, loss, strict=True), key=lambda pair: pair[1])
    return tuple(
        Shown(str(encoder.tokenizer.decode([id for id, _ in pairs], skip_special_tokens=False)), has_loss)
        for has_loss, pairs in parts
    )


def require_known_ids(rows: Sequence[EncodedRow], vocabulary: int, encoder: Encoder) -> None:
    """Raise UserError if a row has a token that the model has no embedding for."""
    largest = max((max(row.ids) for row in rows), default=0)
    if largest >= vocabulary:
        token = encoder.tokenizer.convert_ids_to_tokens(largest)
        raise UserError(
            f"the tokenizer gives {token!r} the id {largest}; the model has embeddings for the ids 0 to "
            f"{vocabulary - 1}: they do not belong together"
        )
