"""Conversations as text: by a chat template if there is one, otherwise in a plain form. Needs no torch.

A chat template is a stranger's program. transformers runs it in a sandbox, where it reaches neither files nor
Python. What it raises, and what it writes beyond a bound, costs the row and not the run.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fedflame.data.conversations import Turn, message
from fedflame.data.messages import BrokenRowError
from fedflame.errors import UserError
from fedflame.reading import escaped, read_bytes, read_object

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLAIN = "plain"
"""The value of `data.chat_template_path` that takes the plain form also where the model has a template."""
LONGEST_TEMPLATE = 1 << 20
LONGEST_TEXT = 1 << 22
"""The most characters of a rendered row."""
_LABELS = {"system": "System:", "user": "Instruction:", "tool": "Tool:", "assistant": "Response:"}
"""What begins the line of a turn in the plain form."""
_MARK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_ONE_DAY = (
    "{%- macro strftime_now(format) -%}{{- {'%Y-%m-%d': '2024-07-26', '%Y': '2024'}"
    ".get(format, '26 Jul 2024') -}}{%- endmacro -%}"
)
"""What templates that name the date are told, on every day: the same run must give the same bytes."""


@dataclass(frozen=True)
class Template:
    """How turns become text."""

    kind: Literal["plain", "model", "given"]
    """The plain form, the model's own chat template, or that of `data.chat_template_path`."""
    jinja: str
    """The text of the chat template; empty for the plain form."""
    special_tokens: Mapping[str, str]
    """Name, such as `bos_token` -> token. A template may write them."""

    @cached_property
    def has_marks(self) -> bool:
        """Whether it says itself what the assistant generates."""
        return _MARK.search(self.jinja) is not None

    @property
    def in_words(self) -> str:
        """What it is, in words."""
        return {
            "plain": "the plain form (Instruction, Input, Response)",
            "model": "the base model's own chat template",
            "given": "the chat template of data.chat_template_path",
        }[self.kind]

    @property
    def digest(self) -> str:
        """A hash of the template; empty for the plain form."""
        return hashlib.blake2b(self.jinja.encode(), digest_size=16).hexdigest() if self.jinja else ""

    def render(self, turns: Sequence[Turn], tools: str = "", prompt: bool = False) -> str:
        """Return the text of turns.

        Args:
            turns: what is said.
            tools: a JSON list; empty for none.
            prompt: whether the beginning of the assistant's next turn follows (`add_generation_prompt`).

        Raises:
            BrokenRowError: the template refuses these turns, fails on them, or writes too much.
        """
        if self.jinja:
            return self._rendered(turns, tools, prompt, False)[0]
        return _plain(turns, tools, self.special_tokens.get("eos_token", ""), prompt)

    def marks(self, turns: Sequence[Turn], tools: str = "") -> list[tuple[int, int]]:
        """Return the stretches of the text that a template's own marks enclose.

        Raises:
            BrokenRowError: as `render`.
        """
        return self._rendered(turns, tools, False, True)[1]

    def _rendered(
        self, turns: Sequence[Turn], tools: str, prompt: bool, marked: bool
    ) -> tuple[str, list[tuple[int, int]]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        render: Any = render_jinja_template
        try:
            texts, marks = render(
                [[message(turn) for turn in turns]],
                tools=json.loads(tools) if tools else None,
                chat_template=_ONE_DAY * ("strftime_now" in self.jinja) + self.jinja,
                return_assistant_tokens_mask=marked,
                add_generation_prompt=prompt,
                **self.special_tokens,
            )
        except Exception as error:  # of jinja, or of Python within the template's expressions
            raise BrokenRowError(f"the chat template refuses it: {_first_line(error)}") from None
        if len(texts[0]) > LONGEST_TEXT:
            raise BrokenRowError(f"the chat template writes {len(texts[0]):,} characters of it; {_AT_MOST}")
        return texts[0], marks[0] if marked else []


_AT_MOST = f"at most {LONGEST_TEXT:,} are taken"


def choose_template(tokenizer: PreTrainedTokenizerBase, chat_template_path: str = "") -> Template:
    """Return the template of a path if there is one, else that of the tokenizer, else the plain form.

    Raises:
        UserError: there is no template at the path, or the template is too long or no jinja.
    """
    special: dict[str, str] = {
        name: token for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)
    }
    if chat_template_path == PLAIN:
        return Template("plain", "", special)
    if chat_template_path:
        where = f"data.chat_template_path = {chat_template_path!r}"
        found = Template("given", _read(Path(chat_template_path), where), special)
    else:
        where, own = "the model's chat template", _own(tokenizer)
        if not own:
            return Template("plain", "", special)
        found = Template("model", own, special)
    _require_jinja(found.jinja, where)
    return found


def _own(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the tokenizer's template, of several the default one; empty for none."""
    own: Any = tokenizer.chat_template
    if isinstance(own, dict):
        own = own.get("default", "")
    return own if isinstance(own, str) else ""


def _read(path: Path, where: str) -> str:
    file = path / "chat_template.jinja" if path.is_dir() else path
    settings = path / "tokenizer_config.json"
    try:
        if path.is_dir() and not file.exists() and settings.exists():
            text = read_object(settings).get("chat_template")
        elif not file.exists():
            raise UserError(
                f"{where}: no such file; it must be a jinja file, a tokenizer's folder with "
                f"chat_template.jinja, {PLAIN!r}, or empty for the model's own"
            )
        else:
            text = read_bytes(file, LONGEST_TEMPLATE).decode("utf-8-sig")
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{where}: has no chat template")
    return text


def _require_jinja(text: str, where: str) -> None:
    """Raise UserError unless the text is a jinja template of a size that one has."""
    if len(text) > LONGEST_TEMPLATE:
        raise UserError(f"{where}: has {len(text):,} characters; at most {LONGEST_TEMPLATE:,} are read")
    import jinja2
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        render_jinja_template([[]], chat_template=text)
    except (jinja2.TemplateSyntaxError, RecursionError) as error:
        line = f"line {error.lineno}: " if isinstance(error, jinja2.TemplateSyntaxError) else ""
        raise UserError(f"{where}: no jinja template: {line}{_first_line(error)}") from error
    except Exception:  # it compiles; whether it takes the rows is seen with the rows
        return


def _plain(turns: Sequence[Turn], tools: str, end: str, prompt: bool) -> str:
    """Return a line for each turn, and after each of the assistant the end token."""
    if tools or any(turn.more for turn in turns):
        raise BrokenRowError("it has tools, which the plain form cannot show; name a data.chat_template_path")
    lines = []
    for turn in turns:
        context = f"\nInput: {turn.context}" if turn.context else ""
        lines.append(f"{_LABELS[turn.role]} {turn.content}{context}{end if turn.role == 'assistant' else ''}")
    return "\n".join([*lines, _LABELS["assistant"]] if prompt else lines)


def _first_line(error: BaseException) -> str:
    line = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
    return escaped(line)
