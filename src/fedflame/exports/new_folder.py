"""Write folders atomically: a folder appears complete or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from fedflame.errors import UserError
from fedflame.json_text import to_text

RUN_FILE = "fedflame.json"
"""The file that marks an export. Only a folder that holds it is ever replaced."""


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
        _fsync(file for file in folder.rglob("*") if file.is_file())
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
    if target.exists():
        target.rename(old)
    try:
        folder.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise


def _fsync(files: Iterable[Path]) -> None:
    for file in files:
        with file.open("rb") as opened:
            os.fsync(opened.fileno())


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write indented JSON with a newline at the end."""
    path.write_text(to_text(values, indent=2) + "\n", encoding="utf-8")
