"""The tokenizer of a run with the settings of its rows, and texts as tokens. Needs no torch."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from fedflame.config.sections import DataConfig
from fedflame.config.values import CompletionOnly
from fedflame.data.conversations import Conversation, Turn
from fedflame.data.messages import BrokenRowError
from fedflame.data.speech import find_speech
from fedflame.data.templates import Template, choose_template
from fedflame.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Encoder:
    """How the rows of a run become tokens."""

    tokenizer: PreTrainedTokenizerBase
    template: Template
    max_length: int
    """The most tokens of a row."""
    assistant_only_loss: bool = True
    completion_only_loss: CompletionOnly = "auto"
    train_on_eos: bool = True

    @cached_property
    def special(self) -> re.Pattern[str]:
        """Matches the tokenizer's special tokens, the longest first."""
        added = self.tokenizer.added_tokens_decoder.values()
        tokens = {str(token) for token in (*self.tokenizer.all_special_tokens, *added) if str(token)}
        longest_first = sorted(tokens, key=lambda token: (-len(token), token))
        return re.compile("(?:" + ("|".join(map(re.escape, longest_first)) or "(?!)") + ")")

    @cached_property
    def beginning(self) -> list[int]:
        """The ids that the tokenizer puts before a text, such as BOS. A chat template writes them itself."""
        if self.template.jinja:
            return []
        bare = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        whole = self.tokenizer("a")["input_ids"]
        places = range(len(whole) - len(bare) + 1)
        return next((whole[:place] for place in places if whole[place : place + len(bare)] == bare), [])

    @cached_property
    def end_tokens(self) -> list[int]:
        """The ids that end a generated answer: the tokenizer's own, and the template's end of turn."""
        ends = {self.end_token}
        greeting = Conversation((Turn("user", "Hi"), Turn("assistant", "Hello")))
        try:
            text = self.template.render(greeting.turns)
            last = find_speech(greeting, text, self.template, self.special, True)[-1]
        except BrokenRowError:  # it takes other rows only
            return sorted(ends)
        closing = self.tokenizer.convert_tokens_to_ids(text[last.closing : last.end])
        return sorted(ends | ({closing} if last.is_closed and isinstance(closing, int) else set()))

    @property
    def end_token(self) -> int:
        """The id of the tokenizer's end token. Raises UserError if it has none."""
        if self.tokenizer.eos_token_id is None:
            raise UserError("the tokenizer has no eos_token; responses need one to end")
        return int(self.tokenizer.eos_token_id)

    def ends(self, text: str) -> bool:
        """Whether a row of this text needs no end token more."""
        said = text.rstrip()
        return not self.train_on_eos or any(match.end() == len(said) for match in self.special.finditer(said))

    def completion_only(self, row: Conversation) -> bool:
        """Whether only the completion has loss, or the last turn of a row that does not name one."""
        return self.completion_only_loss == "true" or (
            self.completion_only_loss == "auto" and row.completion > 0
        )


def new_encoder(
    tokenizer: PreTrainedTokenizerBase, max_length: int, data: DataConfig | None = None
) -> Encoder:
    """Return the encoder for rows of at most so many tokens, with the settings of `data` or the defaults.

    Raises:
        UserError: see `choose_template`.
    """
    data = data or DataConfig()
    return Encoder(
        tokenizer,
        choose_template(tokenizer, data.chat_template_path),
        max_length,
        data.assistant_only_loss,
        data.completion_only_loss,
        data.train_on_eos,
    )


@dataclass(frozen=True)
class PromptForm:
    """What a run was trained on, as whoever prompts the model must know it."""

    template: str
    """`plain`, `model` or `given`; see `Template`."""
    jinja: str
    """The chat template; empty for the plain form."""
    prompt: str
    """The prompt of a row whose instruction is `{instruction}`; empty if the template takes no such row."""
    beginning: str
    """What the tokenizer puts before the prompt, as text."""
    end: str
    """What ends an answer, as text."""


PLAIN_FORM = PromptForm("plain", "", "Instruction: {instruction}\nResponse:", "", "")
"""Of runs that kept none, all of which were trained on the plain form."""


def prompt_form(encoder: Encoder) -> PromptForm:
    """Return the form of the encoder's prompts."""
    tokenizer = encoder.tokenizer
    try:
        prompt = encoder.template.render([Turn("user", "{instruction}")], prompt=True)
    except BrokenRowError:
        prompt = ""
    names = [
        tokenizer.convert_ids_to_tokens(encoder.beginning),
        tokenizer.convert_ids_to_tokens(encoder.end_tokens),
    ]
    beginning, ends = ("".join(map(str, names[0])), " or ".join(map(str, names[1])))
    return PromptForm(encoder.template.kind, encoder.template.jinja, prompt, beginning, ends)


@dataclass(frozen=True)
class Tokens:
    """A text as tokens."""

    ids: list[int]
    ends: list[int]
    """For each token, where it ends in the text."""

    def first_after(self, place: int) -> int:
        """Return the index of the first token that goes beyond a place in the text."""
        return bisect_right(self.ends, place)

    def within(self, stretches: Iterable[tuple[int, int]]) -> list[int]:
        """Return the indices of the tokens of these stretches of the text, in their order."""
        return [
            index
            for start, stop in stretches
            for index in range(self.first_after(start), self.first_after(stop))
        ]


def tokenise(texts: Sequence[str], encoder: Encoder) -> list[Tokens]:
    """Tokenise whole texts in one call: most of the time for one text alone is the way to the tokenizer."""
    if not texts:
        return []
    tokenizer, has_offsets = encoder.tokenizer, encoder.tokenizer.is_fast
    encoded = tokenizer(
        list(texts),
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        return_offsets_mapping=has_offsets,
    )
    if has_offsets:
        ends = [[stop for _, stop in offsets] for offsets in encoded["offset_mapping"]]
    else:
        ends = [_ends(text, ids, tokenizer) for text, ids in zip(texts, encoded["input_ids"], strict=True)]
    return [Tokens(list(ids), its) for ids, its in zip(encoded["input_ids"], ends, strict=True)]


def _ends(text: str, ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return where tokens end in a text, if the tokenizer does not say: by the length of what they spell."""
    ends, length = [], 0
    for count in range(1, len(ids) + 1):
        length = max(length, len(str(tokenizer.decode(ids[:count]))))
        ends.append(min(length, len(text)))
    return ends


def pad_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the padding id, or the end token if there is none; the attention mask hides it."""
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if pad is None:
        raise UserError("the tokenizer has no eos_token; responses need one to end")
    return int(pad)
