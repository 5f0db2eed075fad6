"""A run folder with one damaged file: each reader refuses it in one line, or ends as if it were whole.

Harmless means just that: the same report, the same scores, the same bytes. A file that a reader does not open
is harmless to it; which those are is watched, not assumed.
"""

from __future__ import annotations

import random
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from tests.folder_contents import contents
from tests.tiny_runs import adapter_bytes, state_bytes, tiny_config, tiny_run

import fedflame
from fedflame.errors import UserError
from fedflame.experiment.prepare import prepare
from fedflame.experiment.run import run_experiment

pytestmark = pytest.mark.slow

SETTINGS = ("communication.update_dtype=int8", "evaluation.generate_every=0", "evaluation.max_new_tokens=0")
FLIPS = 10
Reader = Callable[[Path, Path], Any]


@dataclass
class Opened:
    """The files that are opened for reading: as they were, or after they were put in place anew."""

    found: set[Path] = field(default_factory=set)
    renewed: set[Path] = field(default_factory=set)
    _placed: set[Path] = field(default_factory=set)

    def note(self, event: str, given: tuple[Any, ...]) -> None:
        if event == "os.rename":
            self._placed.add(Path(given[1]))
        elif event == "open" and isinstance(given[0], str) and given[1] in ("r", "rb"):
            path = Path(given[0])
            is_new = not self._placed.isdisjoint((path, *path.parents)) and path not in self.found
            (self.renewed if is_new else self.found).add(path)


_opened: Opened | None = None


def _watch(event: str, given: tuple[Any, ...]) -> None:
    if _opened is not None:
        _opened.note(event, given)


sys.addaudithook(_watch)


@contextmanager
def opened() -> Iterator[Opened]:
    """The files that are opened for reading within the block."""
    global _opened
    _opened = Opened()
    try:
        yield _opened
    finally:
        _opened = None


@pytest.fixture(scope="module")
def finished(undisturbed: Callable[..., Path]) -> Path:
    """Three rounds with rounded updates, so that clients owe something; two checkpoints."""
    return undisturbed(*SETTINGS)


def report(run: Path, model: Path) -> str:
    from fedflame.report import write_report

    return write_report(run).read_text()


def metrics(run: Path, model: Path) -> Any:
    return fedflame.Run(run).metrics, fedflame.Run(run).scores


def values(run: Path, model: Path) -> Any:
    finished = fedflame.Run(run)
    tensors = finished.adapter(2).tensors()
    return finished.config, finished.rescaler(2), {name: value.tolist() for name, value in tensors.items()}


def export(run: Path, model: Path) -> Any:
    to = fedflame.export(run, run.parent / "export", overwrite=True)
    return {path.name: path.read_bytes() for path in to.rglob("*.safetensors")}


def evaluate(run: Path, model: Path) -> Any:
    return fedflame.evaluate(run, active_experts=[1])


def evaluate_adapter(run: Path, model: Path) -> Any:
    return fedflame.evaluate(run / "adapter", active_experts=[1], overrides=["data.max_rows=48"])


def resume(run: Path, model: Path) -> Any:
    """Go back by a round and train it again."""
    run_experiment(prepare(tiny_config(model, run, *SETTINGS), "resume", resume_from=2))
    return adapter_bytes(run), state_bytes(run)


def resume_at_the_end(run: Path, model: Path) -> Any:
    tiny_run(model, run, *SETTINGS, existing="resume")
    return adapter_bytes(run), state_bytes(run)


READERS: list[Reader] = [
    report, metrics, values, export, evaluate, evaluate_adapter, resume, resume_at_the_end,
]  # fmt: skip
ALL = {"config.json", "environment.json", "partition.json", "plan.json", "metrics.jsonl"}
READ: dict[Reader, set[str]] = {
    report: {*ALL, "round-3"},
    metrics: {*ALL, "round-3"},
    values: {"config.json", "round-3"},
    export: {"config.json", "round-3"},
    evaluate: {"config.json", "environment.json", "round-3"},
    evaluate_adapter: {"fedflame.json", "adapter_config.json"},
    resume: {
        "config.json",
        "environment.json",
        "partition.json",
        "plan.json",
        "metrics.jsonl",
        "round-2",
        "2",
    },
    resume_at_the_end: {
        "config.json",
        "environment.json",
        "partition.json",
        "plan.json",
        "metrics.jsonl",
        "round-3",
    },
}
"""What each opens, at least."""


def copy(finished: Path, to: Path) -> Path:
    shutil.rmtree(to.parent, ignore_errors=True)
    shutil.copytree(finished, to)
    return to


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.__name__)
@pytest.mark.timeout(600)
def test_ten_flipped_bits_in_each_file_are_refused_or_harmless(
    reader: Reader, finished: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    run, rng = tmp_path / "work" / "run", random.Random(20)
    with opened() as files:
        wanted = reader(copy(finished, run), tiny_folder)
    read, renewed = (
        sorted(inside(run, paths) & contents(finished).keys()) for paths in (files.found, files.renewed)
    )
    assert READ[reader] <= {Path(name).name.removesuffix(".sealed") for name in (*read, *renewed)}
    for name in renewed:  # all at once: whatever stood there is gone before anyone looks
        content = (finished / name).read_bytes()
        (copy(finished, run) / name).write_bytes(flipped(content, rng.sample(range(8 * len(content)), FLIPS)))
        assert reader(run, tiny_folder) == wanted, name
    refused = 0
    copy(finished, run)
    for name in read:
        content = (finished / name).read_bytes()
        for place in rng.sample(range(8 * len(content)), FLIPS):
            (run / name).write_bytes(flipped(content, [place]))
            try:
                got = reader(run, tiny_folder)
            except UserError as error:
                assert "\n" not in str(error)
                refused += 1
                (run / name).write_bytes(content)
            else:
                assert got == wanted, f"bit {place} of {name}"
                copy(finished, run)
        assert contents(run) == contents(finished), "who refuses leaves all as it was"
    assert refused > 0.8 * FLIPS * len(read), "only the layout of JSON may be harmless"


def inside(run: Path, paths: set[Path]) -> set[str]:
    return {str(path.relative_to(run)) for path in paths if path.is_relative_to(run)}


def flipped(content: bytes, places: Sequence[int]) -> bytes:
    changed = bytearray(content)
    for place in places:
        changed[place // 8] ^= 1 << place % 8
    return bytes(changed)


@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "a folder", "a list", "no UTF-8", "deep"])
def test_files_that_are_missing_cut_or_of_another_type_are_refused(
    damage: str, finished: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    run = tmp_path / "work" / "run"
    damaged = {"empty": b"", "a list": b"[1, 2]\n", "no UTF-8": b'{"a": "\xff"}\n', "deep": b"[" * 100_000}
    for reader in (report, metrics, values, export, resume):
        for name in sorted(contents(finished)):
            if Path(name).name.removesuffix(".sealed") not in READ[reader]:
                continue
            path = copy(finished, run) / name
            if damage == "cut":
                path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
            elif damage in damaged:
                path.write_bytes(damaged[damage])
            else:
                path.unlink()
                if damage == "a folder":
                    path.mkdir()
            before = contents(run)
            if damage == "missing" and name.endswith("round-3.sealed") and reader in (report, metrics):
                reader(run, tiny_folder)  # the checkpoint before vouches for the metrics until then
                continue
            if damage == "missing" and name.endswith("round-3.sealed"):
                assert fedflame.Run(run).adapter(2).tensors(), "the last that is there"
                continue
            with pytest.raises(UserError) as refused:
                reader(run, tiny_folder)
            line = str(refused.value)
            if (damage, name) == ("missing", "checkpoint/round-2.sealed"):
                assert line == f"{run}: no checkpoint after round 2 is kept; there are those after 3"
            else:
                assert "\n" not in line and Path(name).name in line, name
            assert contents(run) == before


def test_metrics_that_end_before_their_checkpoint_are_refused_before_training(
    finished: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = copy(finished, tmp_path / "work" / "run")
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (run / "metrics.jsonl").write_bytes(b"".join(lines[:-1]))
    monkeypatch.setattr("fedflame.experiment.run.assemble", lambda *_: pytest.fail("it loads the model"))
    for read in (resume_at_the_end, report, metrics):
        with pytest.raises(UserError, match=r"metrics\.jsonl: [\d,]+ bytes of lines; its checkpoint needs"):
            read(run, tiny_folder)


def test_a_run_without_its_checkpoints_is_not_begun_anew(
    finished: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    run = copy(finished, tmp_path / "work" / "run")
    shutil.rmtree(run / "checkpoint")
    before = (run / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match="the run has no checkpoint; put back a copy of it, or start anew"):
        resume_at_the_end(run, tiny_folder)
    assert (run / "metrics.jsonl").read_bytes() == before


def test_what_a_client_owes_must_be_there(finished: Path, tiny_folder: Path, tmp_path: Path) -> None:
    for client in range(3):
        run = copy(finished, tmp_path / "work" / "run")
        (run / "residuals" / str(client) / "2.sealed").unlink()
        with pytest.raises(
            UserError, match=rf"residuals/{client}/2\.sealed: missing: what client {client} owes"
        ):
            resume(run, tiny_folder)
