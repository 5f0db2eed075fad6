"""`fedflame watch` as a process: its address, its page, its end."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.tiny_runs import invoke

SITE = 'name = "north"\n[data]\ndataset_name = "rows.jsonl"\n[trainer]\nactive_experts = 1\n'


@pytest.mark.parametrize("what", ["run", "site", "site.toml"])
def test_it_says_where_the_page_is_and_ends_by_ctrl_c(
    what: str, undisturbed: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "site.toml").write_text(SITE)
    place = {"run": undisturbed(), "site": tmp_path, "site.toml": tmp_path / "site.toml"}[what]
    command = [sys.executable, "-m", "fedflame", "watch", str(place)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        line = process.stdout.readline()
        found = re.fullmatch(rf"{place}: (http://127\.0\.0\.1:\d+/\S+) \(Ctrl-C ends it\)\n", line)
        assert found, line
        with urllib.request.urlopen(found[1], timeout=30) as answer:
            text = answer.read().decode()
        assert ("Finished." if what == "run" else "fedflame site") in text
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
        assert (process.stdout.read(), process.stderr.read()) == ("", "")


def test_what_cannot_be_watched_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "site.toml").write_text("name = 3\n")
    for place, reason in ((tmp_path / "none", "does not exist"), (tmp_path, "site.toml: name = 3: ")):
        done = invoke("watch", place)
        assert done.exit_code == 2 and reason in done.stderr and done.stderr.count("\n") == 1, done.stderr
