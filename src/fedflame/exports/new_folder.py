"""Write folders atomically: a folder appears complete or not at all."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from fedflame.checked_json import CHECKSUM, read_checked
from fedflame.errors import UserError
from fedflame.json_text import to_text
from fedflame.reading import read_object

FIRST_VERSION = 1
"""Of an adapter folder; it had no checksums."""
RUN_FILE = "fedflame.json"
"""The file that marks an export. Only a folder that holds it is ever replaced."""


SUMMED = ("*.safetensors", "*.gguf", "*.json")
"""The files of an adapter folder that `fedflame.json` has the checksums of."""


def checksums(folder: Path) -> dict[str, str]:
    """Return the checksum of each of a folder's files that have one in `fedflame.json`, by its name there."""
    paths = {path for pattern in SUMMED for path in folder.rglob(pattern) if path.name != RUN_FILE}
    return {path.relative_to(folder).as_posix(): _file_checksum(path) for path in sorted(paths)}


def require_intact(folder: Path) -> None:
    """Check an adapter folder that fedflame wrote; nothing is known of one that others wrote.

    Raises:
        UserError: a file is missing, damaged or edited.
    """
    if not (folder / RUN_FILE).exists():
        return
    advice = f"export it again; without {RUN_FILE} an edited folder is read as one of others"
    if _is_first_version(folder / RUN_FILE):
        return
    for name, wanted in read_checked(folder / RUN_FILE, advice).get("checksums", {}).items():
        try:
            got = _file_checksum(folder / name)
        except OSError as error:
            raise UserError(f"{folder / name}: {error.strerror}; {advice}") from error
        if got != wanted:
            raise UserError(f"{folder / name}: its checksum is wrong: damaged or edited; {advice}")


def _is_first_version(path: Path) -> bool:
    try:
        stated = read_object(path)
    except UserError:  # `read_checked` says what is wrong
        return False
    return stated.get("format_version") == FIRST_VERSION and CHECKSUM not in stated


def _file_checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


@contextmanager
def new_folder(to: Path, overwrite: bool) -> Iterator[Path]:
    """Yield a temporary folder to fill. It becomes `to` if the block succeeds; otherwise it is removed.

    Raises:
        UserError: the target must not be replaced, or cannot be written. It is unchanged.
    """
    target = to.resolve()
    require_free(target, overwrite)
    aside = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        folder = aside / "new"
        folder.mkdir()
        yield folder
        files = [file for file in folder.rglob("*") if file.is_file()]
        _make_readable(files, aside)
        _fsync(files)
        _replace(folder, target, aside / "old")
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{to}: cannot write: {reason}; nothing was changed") from error
    finally:
        if aside is not None:
            shutil.rmtree(aside, ignore_errors=True)


def require_free(target: Path, overwrite: bool) -> None:
    """Check that a target is empty, or an earlier export that may be replaced.

    Raises:
        UserError: `target` is a file, or a folder that must not be replaced.
    """
    if not target.exists():
        return
    if not target.is_dir():
        raise UserError(f"{target} is a file; a folder is written")
    if not any(target.iterdir()):
        return
    if not (target / RUN_FILE).is_file():
        raise UserError(f"{target} is not empty and no earlier export; choose another folder")
    if not overwrite:
        raise UserError(f"{target} holds an earlier export; --overwrite replaces it")


def _replace(folder: Path, target: Path, old: Path) -> None:
    """Put a folder in the place of the target, which is there again where anything ends this on the way."""
    try:
        if target.exists():
            target.rename(old)
        folder.rename(target)
    except BaseException:
        if old.exists() and not target.exists():
            old.rename(target)
        raise


def _make_readable(files: Iterable[Path], aside: Path) -> None:
    """Give files the mode of any new file here; safetensors writes files that only their owner can read."""
    probe = aside / "mode"
    probe.touch()
    mode = stat.S_IMODE(probe.stat().st_mode)
    for file in files:
        file.chmod(mode)


def _fsync(files: Iterable[Path]) -> None:
    for file in files:
        with file.open("rb") as opened:
            os.fsync(opened.fileno())


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write indented JSON with a newline at the end."""
    path.write_text(to_text(values, indent=2) + "\n", encoding="utf-8")
