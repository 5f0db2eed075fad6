"""Writes docs/command-line.md from the commands themselves: `python docs/make_command_line.py`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from typer.main import get_command

from fedflame.cli import app

PAGE = Path(__file__).with_name("command-line.md")

INTRODUCTION = """\
# Command line

This page is made from the code by `python docs/make_command_line.py`.

- `fedflame --version` prints the version, and `fedflame COMMAND --help` the options of a command.
- CONFIG_FILE is a TOML file ([Configuration](configuration.md)). Without it a run takes the embedded model
  and generated data.
- Exit code 0 means that all is well, and 1 that a check or a cell failed. 2 means an error that you can mend;
  one line says what it is. 130 means that you interrupted the command, 143 that SIGTERM ended it, and 129
  that SIGHUP did, as a terminal sends it that is closed.
- These three signals end a command alike: a run keeps its last round, writes its report and says how to go
  on. Further signals leave it to do so, but for a third Ctrl-C. SIGHUP is ignored under `nohup`. A trainer
  that is told to end ends with 0.
"""


def page() -> str:
    """The whole page."""
    return "\n".join([INTRODUCTION, *_commands(get_command(app), "fedflame")])


def _commands(command: Any, name: str) -> Iterator[str]:
    """A part for each command, those of a group after one another."""
    if hasattr(command, "commands"):
        for inner in command.commands.values():
            yield from _commands(inner, f"{name} {inner.name}")
        return
    shown = [parameter for parameter in command.params if parameter.name != "help"]
    arguments = [parameter for parameter in shown if parameter.param_type_name == "argument"]
    options = [parameter for parameter in shown if parameter.param_type_name == "option"]
    usage = " ".join([name, "[OPTIONS]", *map(_place, arguments)])
    lines = [f"- `{_place(argument)}`: {argument.help}\n" for argument in arguments if argument.help]
    lines += map(_option, options)
    words = "\n\n".join(" ".join(part.split()) for part in (command.help or "").split("\n\n"))
    yield f"## {name}\n\n    {usage}\n\n{words}\n\n" + "".join(lines)


def _place(parameter: Any) -> str:
    name = parameter.name.upper()
    return name if parameter.required else f"[{name}]"


def _option(parameter: Any) -> str:
    value = "" if parameter.is_flag else f" {_value(parameter.type, parameter.name)}"
    known = not parameter.is_flag and parameter.default not in (None, "")
    default = " Needed." if parameter.required else f" Default: `{parameter.default}`." if known else ""
    return f"- `{parameter.opts[0]}{value}`: {parameter.help or ''}{default}\n"


def _value(of: Any, name: str) -> str:
    choices = getattr(of, "choices", None)
    if choices:
        return "|".join(str(getattr(choice, "value", choice)) for choice in choices)
    kinds = {"integer": "N", "integer range": "N", "float": "X", "float range": "X"}
    return kinds.get(of.name, name.upper())


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
