"""Read JSON and TOML that may be damaged or a stranger's: one line for what is wrong, whatever it is.

No reader of this file recurses, allocates or runs on without a bound that stands here.
"""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any, NoReturn

from fedflame.errors import UserError
from fedflame.json_text import put_back

LONGEST_JSON = 64 << 20
"""In bytes: more than any JSON file that fedflame or a model has."""
LONGEST_TOML = 1 << 20
DEEPEST = 64
"""Levels of objects and lists in a file."""
_WIDEST = 64
"""Bits of an integer in a file."""


def parse_json(text: bytes, bare_words: bool = False) -> Any:
    """Return the value of a JSON text.

    Args:
        text: the text.
        bare_words: take NaN and infinity as bare words, as pandas and Python write them; they are no JSON.

    Raises:
        ValueError: it is no JSON, is too large, or is nested too deep; the message is one line.
    """
    if len(text) > LONGEST_JSON:
        raise ValueError(f"larger than {LONGEST_JSON:,} bytes")
    try:
        return json.loads(text.decode("utf-8-sig"), parse_constant=None if bare_words else _no_number)
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start}") from error
    except RecursionError as error:
        raise ValueError("not JSON: nested too deep") from error
    except ValueError as error:
        raise ValueError(f"not JSON: {error}") from error


def parse_object(text: bytes, bare_words: bool = False) -> dict[str, Any]:
    """Return the object of a JSON text, with its numbers that are not finite; see `parse_json`.

    Raises:
        ValueError: as `parse_json`; it is no object; or see `require_plain`.
    """
    value = parse_json(text, bare_words)
    if not isinstance(value, dict):
        raise ValueError(f"holds a {type(value).__name__}; it must hold a JSON object")
    require_plain(value)
    return put_back(value)


def read_object(path: Path, what: str = "", bare_words: bool = False) -> dict[str, Any]:
    """Return the object in a JSON file; see `parse_json`.

    Raises UserError with the path, after `what`, and what is wrong.
    """
    try:
        return parse_object(read_bytes(path, LONGEST_JSON), bare_words)
    except ValueError as error:
        raise UserError(f"{what}{path}: {error}") from error


def read_toml(path: Path, what: str = "config file") -> dict[str, Any]:
    """Return the tables of a TOML file. Raises UserError with `what`, the path, and what is wrong."""
    try:
        values = tomllib.loads(read_bytes(path, LONGEST_TOML).decode("utf-8"))
        require_plain(values)
        return values
    except RecursionError as error:
        raise UserError(f"{what} {path}: not TOML: nested too deep") from error
    except _Unreadable as error:
        raise UserError(f"{what} {path}: {error}") from error
    except ValueError as error:  # of tomllib, of text that is not UTF-8, and of int() for its digits
        raise UserError(f"{what} {path}: not TOML: {error}") from error


class _Unreadable(ValueError):
    """A file cannot be read as bytes. The message is the reason."""


def read_bytes(path: Path, most: int) -> bytes:
    """Return the content of a file. Raises ValueError, in one line, where there is none or more than that."""
    try:
        with path.open("rb") as file:
            content = file.read(most + 1)
    except OSError as error:
        raise _Unreadable(error.strerror or str(error)) from error
    except ValueError as error:  # a NUL in the path
        raise _Unreadable(f"no path: {error}") from error
    if len(content) > most:
        raise _Unreadable(f"larger than {most:,} bytes")
    return content


def require_plain(value: object) -> None:
    """Refuse what no key or value needs and what would end a program later.

    Raises:
        ValueError: text with half of a surrogate pair, an integer beyond 64 bits, or more than `DEEPEST`
            levels; the message is one line.
    """
    level = [value]
    for _ in range(DEEPEST):
        for one in level:
            _require_plain_scalar(one)
        level = [inner for one in level for inner in _inside(one)]
        if not level:
            return
    raise ValueError(f"nested in more than {DEEPEST} levels")


def _inside(value: object) -> list[object]:
    if isinstance(value, dict):
        return [*value.keys(), *value.values()]
    return list(value) if isinstance(value, list | tuple) else []


def _require_plain_scalar(value: object) -> None:
    if type(value) is int and value.bit_length() >= _WIDEST:
        raise ValueError("has an integer of more than 64 bits")
    if isinstance(value, str) and any("\ud800" <= letter <= "\udfff" for letter in value):
        raise ValueError(f"has text that is no Unicode: {shown(value)}")


def escaped(text: str) -> str:
    """Return text with every character that is not printable as its escape, such as that of a line feed."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def shown(value: object, longest: int = 100) -> str:
    """Return `repr`, cut to so many characters: what a person needs of a wrong value."""
    try:
        text = repr(value)
    except ValueError:  # an integer of thousands of digits
        return "an integer of thousands of digits"
    return text if len(text) <= longest else f"{text[:longest]}…"


def _no_number(word: str) -> NoReturn:
    raise ValueError(f"{word} is no JSON")
