"""The ledger of a site whose trainer is killed while it writes: no round that was begun is missing."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest

from fedflame.trainer.ledger import FILE_NAME, read_ledger

pytestmark = pytest.mark.slow
BEGIN_ROUNDS = """
import itertools, sys
from pathlib import Path
from fedflame.trainer.ledger import FILE_NAME, Round, begin_round, read_ledger
from fedflame.trainer.site import SiteLimits
folder = Path(sys.argv[1])
for number in itertools.count(len(read_ledger(folder / FILE_NAME))):
    one = Round("ab" * 16, f"{number}", 1.0 + number, "train", "rows.jsonl", 0.1, 1.0, 5)
    begin_round(folder, one, SiteLimits())
    print(number, flush=True)
"""
KILLS = 6


def test_what_was_begun_before_a_kill_is_in_the_ledger_once(tmp_path: Path) -> None:
    chance = random.Random(0)
    begun = 0
    for _ in range(KILLS):
        process = subprocess.Popen(
            [sys.executable, "-c", BEGIN_ROUNDS, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        for _ in range(chance.randint(1, 30)):
            begun = int(process.stdout.readline()) + 1
        process.kill()
        rest = process.communicate()[0].splitlines()
        begun = int(rest[-1]) + 1 if rest else begun
        rounds = read_ledger(tmp_path / FILE_NAME)
        assert [one.plan for one in rounds] == [str(number) for number in range(len(rounds))]
        assert begun <= len(rounds) <= begun + 1, "all that were told, and perhaps the one being written"
