"""Writes docs/configuration.md from the fields of the settings files: `python docs/make_configuration.py`."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from fedflame.config.methods import NAMED_METHODS
from fedflame.config.run_config import RunConfig
from fedflame.config.settings import SettingsFile
from fedflame.config.values import Device, MedianNoneOrNumber, MinFullOrNumber
from fedflame.engines.hub import Hub, LearnedOrSeconds
from fedflame.trainer.site import Site

PAGE = Path(__file__).with_name("configuration.md")
WIDTH = 110

INTRODUCTION = """\
# Configuration

This page is made from the code by `python docs/make_configuration.py`.

There are three settings files, all in [TOML](https://toml.io): that of a run, that of a site and that of a
hub. A key that does not exist is refused, and the message names the nearest one that does.
"""
RUN = """\
## A run

Every key has a default: a file names only what it changes. `fedflame run FILE` reads the file, and
`--set section.key=value` overrides it on the command line. A list may be written as a list or as text:
`[8, 4, 2, 1]` and `"8,4,2,1"` are the same value. `configs/run/` has three files with comments.
"""
SITE = """\
## site.toml

The owner of a site writes this file, or `fedflame site init` does. It never leaves the site. Paths in it
start from its folder. A change counts when the trainer is started again. The page of the
[site administrator](site-administrator.md) explains the set-up.
"""
HUB = """\
## hub.toml

`fedflame hub init` writes this file. Paths in it start from its folder. The page of the
[hub administrator](hub-administrator.md) explains the set-up over NVIDIA FLARE, and the page on
[Flower](flower.md) the one over Flower.
"""

PLAIN: dict[Any, str] = {
    bool: "true or false",
    int: "integer",
    float: "number",
    str: "text",
    tuple[int, ...]: "list of integers",
    tuple[str, ...]: "list of names",
    dict[str, str]: "table of texts",
    dict[str, int]: "table of integers",
}
BOUNDS = ((Ge, "ge", "at least"), (Gt, "gt", "more than"), (Le, "le", "at most"), (Lt, "lt", "less than"))


def page() -> str:
    """The whole page."""
    parts = [INTRODUCTION]
    for words, model in ((RUN, RunConfig), (SITE, Site), (HUB, Hub)):
        parts += [words, *_tables(model)]
    return "\n".join(parts)


def _tables(model: type[BaseModel]) -> Iterator[str]:
    """A list of keys for each table of the file: first those outside any table, in the order of the code."""
    top, tables = list[str](), list[str]()
    for name, field in model.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, BaseModel):
            keys = [_entry(f"{name}.{key}", inner) for key, inner in section.model_fields.items()]
            words = section.__dict__.get("__doc__") or ""
            tables.append(f"### [{name}]\n\n" + (f"{words}\n\n" if words else "") + "".join(keys))
        elif name not in SettingsFile.model_fields:
            top.append(_entry(name, field))
    yield "".join(top)
    yield from tables


def _entry(key: str, field: FieldInfo) -> str:
    default = (
        "needed"
        if field.is_required()
        else f"default `{_toml(field.get_default(call_default_factory=True))}`"
    )
    words = " ".join((field.description or "").split())
    meaning = textwrap.fill(
        words,
        WIDTH,
        initial_indent="  ",
        subsequent_indent="  ",
        break_long_words=False,
        break_on_hyphens=False,
    )
    return f"- **`{key}`**: {_type(key, field)}; {default}.\n\n{meaning}\n"


def _type(key: str, field: FieldInfo) -> str:
    """The type and what is allowed, in words."""
    if key == "strategy.name":
        return _one_of(NAMED_METHODS)
    if get_args(MinFullOrNumber)[1] in field.metadata:
        return "`min`, `full` or an integer of at least 1"
    if get_args(MedianNoneOrNumber)[1] in field.metadata:
        return "`median`, `none` or a number above 0"
    if get_args(Device)[1] in field.metadata:
        return "`auto`, `cpu`, `cuda` or a card such as `cuda:1`"
    if get_args(LearnedOrSeconds)[1] in field.metadata:
        return "`learned` or a number of at least 0"
    choices = list(_choices(field.annotation))
    bounds = [
        f"{words} {_number(getattr(part, name))}"
        for part in field.metadata
        for bound, name, words in BOUNDS
        if isinstance(part, bound)
    ]
    patterns = [f"as in the pattern `{part.pattern}`" for part in field.metadata if hasattr(part, "pattern")]
    limits = " and ".join(bounds + patterns)
    if choices and get_origin(field.annotation) is tuple:
        return f"list, each {_one_of(choices)}"
    return (_one_of(choices) if choices else PLAIN[field.annotation]) + (f", {limits}" if limits else "")


def _choices(annotation: Any) -> Iterator[str]:
    """The values of a `Literal`, or of several side by side."""
    for part in get_args(annotation) if annotation not in PLAIN else ():
        if isinstance(part, str):
            yield part
        else:
            yield from _choices(part)


def _number(bound: float) -> str:
    """A bound as people write it, such as 2^63."""
    power = int(bound).bit_length() - 1
    return f"2^{power}" if power > 20 and bound == 2**power else str(bound)


def _one_of(choices: Iterable[str]) -> str:
    return "one of " + ", ".join(f"`{choice}`" for choice in choices)


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        pairs = ", ".join(f"{json.dumps(name)} = {_toml(inner)}" for name, inner in value.items())
        return f"{{ {pairs} }}" if pairs else "{}"
    return json.dumps(value)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
