"""The checkpoints of best rounds: there for every round that a run can go on from, killed or not."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fedflame.run_files.checkpoints import best_kept, checkpoint_path, kept_rounds, remove_later, write_sealed

TIERS, ROUNDS = 3, 14


class Killed(BaseException):
    pass


def best_of(rng: random.Random) -> list[set[int]]:
    """For each round the rounds that are best after it, for tiers that improve at random."""
    rounds, found = [0] * TIERS, []
    for number in range(ROUNDS):
        rounds = [number if rng.random() < 0.2 else best for best in rounds]
        found.append({*rounds})
    return found


def write(run: Path, number: int, most: int, best: list[set[int]]) -> None:
    write_sealed(run, number, b"after %d" % number, most, lambda at: best[at])


def assert_whole(run: Path, best: list[set[int]]) -> None:
    """Whatever round it goes on from, the run has that and all that were best then."""
    for number in kept_rounds(run):
        for needed in {number} | best[number]:
            assert checkpoint_path(run, needed).read_bytes().endswith(b"after %d" % needed)


@pytest.mark.parametrize("most", [1, 2, 4])
def test_every_kept_round_has_its_best_ones_and_there_are_few(tmp_path: Path, most: int) -> None:
    for seed in range(6):
        run, best = tmp_path / str(seed), best_of(random.Random(seed))
        for number in range(ROUNDS):
            write(run, number, most, best)
            assert_whole(run, best)
            last = list(range(max(0, number - most + 1), number + 1))
            assert kept_rounds(run) == last
            assert best_kept(run) == sorted(best[last[0]] - {*last})
            assert len(list((run / "checkpoint").iterdir())) <= most + TIERS


@contextmanager
def killed_at(call: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Die before the `call`-th change of a folder within the block."""
    left = [call]

    def dying(method: Callable[..., object]) -> Callable[..., object]:
        def change(*given: object, **named: object) -> object:
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return method(*given, **named)

        return change

    with monkeypatch.context() as patch:
        for name in ("replace", "rename", "unlink"):
            patch.setattr(Path, name, dying(getattr(Path, name)))
        yield


def test_killed_before_any_change_of_the_folder_the_run_goes_on_to_the_same_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    died = 0
    for seed in range(4):
        best, rng = best_of(random.Random(seed)), random.Random(seed)
        run, whole = tmp_path / f"killed-{seed}", tmp_path / f"whole-{seed}"
        for number in range(ROUNDS):
            try:
                with killed_at(rng.randrange(5), monkeypatch):
                    write(run, number, 2, best)
            except Killed:
                died += 1
                if number:
                    assert_whole(run, best)
                back = kept_rounds(run)[0] if kept_rounds(run) and rng.random() < 0.5 else number - 1
                if back < number - 1:
                    remove_later(run, back)
                    assert_whole(run, best)
                for again in range(back + 1, number + 1):
                    write(run, again, 2, best)
            assert_whole(run, best)
            write(whole, number, 2, best)
        assert sorted(p.name for p in (run / "checkpoint").iterdir()) == sorted(
            p.name for p in (whole / "checkpoint").iterdir()
        )
    assert died > 20


def test_what_was_best_and_is_no_longer_goes(tmp_path: Path) -> None:
    best = [{0}, {0}, {0}, {3}, {3}, {3}]
    for number in range(6):
        write(tmp_path, number, 2, best)
        assert best_kept(tmp_path) == [[], [], [0], [0], [], [3]][number]
