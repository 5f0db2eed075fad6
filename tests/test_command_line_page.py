"""docs/command-line.md is what the commands say."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

import make_command_line
from fedflame.cli import app

TEXT = make_command_line.PAGE.read_text(encoding="utf-8")


def test_the_page_is_up_to_date() -> None:
    assert make_command_line.page() == TEXT, "run python docs/make_command_line.py"


@pytest.mark.parametrize("command", ["run", "plan", "compare", "bench", "export", "hub init", "site init"])
def test_every_word_that_begins_an_option_of_the_help_is_in_its_part(command: str) -> None:
    shown = CliRunner().invoke(app, [*command.split(), "--help"], env={"COLUMNS": "200"}).output
    part = TEXT.split(f"## fedflame {command}\n")[1].split("\n## ")[0]
    options = {
        word for word in shown.split() if word.startswith("--") and len(word) > 2 and word[2].isalpha()
    }
    assert len(options) > 3
    assert {option for option in options - {"--help"} if option not in part} == set()
