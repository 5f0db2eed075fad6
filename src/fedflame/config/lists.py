"""Lists in settings, written as a list or as text: `[8, 4, 2, 1]` and `"8,4,2,1"` are the same value."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator

_DIGITS = 9
"""Of the largest integer that a list in settings can hold."""


def parse_integers(value: object) -> tuple[int, ...]:
    """`"8,4,2,1"`, `[8, 4, 2, 1]` and, for one of them, `8`; ValueError on anything but positive integers."""
    parts = list_parts(value)
    numbers = [int(part) for part in parts if is_integer(part)]
    if not parts or len(numbers) < len(parts) or not 1 <= min(numbers) <= max(numbers) < 10**_DIGITS:
        raise ValueError('must be integers of at least 1, such as [8, 4, 2, 1] or "8,4,2,1"')
    return tuple(numbers)


def is_integer(part: Any) -> bool:
    """Whether it is an integer, or the digits of one that a setting can have."""
    return type(part) is int or (
        isinstance(part, str) and part.isascii() and part.isdecimal() and len(part) <= _DIGITS
    )


def list_parts(value: object) -> list[Any]:
    """Return the entries of a list that may be written as text, unchecked."""
    if isinstance(value, str):
        text = value.strip().removeprefix("[").removesuffix("]")
        return [part.strip().strip("\"'") for part in text.split(",")] if text.strip() else []
    return list(value) if isinstance(value, list | tuple) else [value]


def _integers_or_none(value: object) -> tuple[int, ...]:
    return parse_integers(value) if list_parts(value) else ()


def names_but_none(value: object) -> tuple[Any, ...]:
    """Each name once; `"none"`, as transformers writes it, is no name."""
    parts = list_parts(value)
    return tuple(part for at, part in enumerate(parts) if part != "none" and part not in parts[:at])


Integers = Annotated[tuple[int, ...], BeforeValidator(parse_integers)]
IntegersOrNone = Annotated[tuple[int, ...], BeforeValidator(_integers_or_none)]
Names = Annotated[tuple[str, ...], BeforeValidator(list_parts)]
