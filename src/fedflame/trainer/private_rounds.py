"""How a site carries out a private plan: its terms, the units of its rows, and the secret of its noise."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import torch

from fedflame import __version__
from fedflame.atomic_file import fsync_folder
from fedflame.data.conversations import Conversation
from fedflame.errors import UserError
from fedflame.messages import RoundPlan
from fedflame.privacy.noise import SECRET_BYTES, Noise
from fedflame.privacy.terms import Terms, terms_of
from fedflame.trainer.refusal import Refusal
from fedflame.trainer.site import Site

SECRET_FILE = "noise.key"


def required_terms(site: Site, plan: RoundPlan, units: int) -> Terms | None:
    """Return the terms of a plan for a site with so many rows, or persons; None for one that is not private.

    Raises:
        Refusal: the site's file asks for privacy, and the plan has none.
        UserError: see `privacy.terms.terms_of`.
    """
    if plan.is_private:
        return terms_of(plan, units)
    if site.privacy.require:
        raise Refusal('this site takes part in private runs only (privacy.require); set privacy.unit = "row"')
    return None


def units_of(rows: Sequence[Conversation]) -> list[list[int]]:
    """Return the numbers of the rows that are protected together: those of a person, or each by itself."""
    units: dict[str, list[int]] = {}
    for number, row in enumerate(rows):
        units.setdefault(row.owner or f"\0{number}", []).append(number)
    return list(units.values())


def release_key(plan: str, rows: Sequence[Conversation], device: str) -> str:
    """Return what identifies an answer: the plan, and all by which the sums before the noise could differ.

    Other rows, versions or processors give other sums. With the same noise, the difference of two answers
    would have none.

    Args:
        plan: the digest of plan and job.
        rows: of the site.
        device: that trains.
    """
    said = [[*row.to_values(), row.owner] for row in rows]
    versions = __version__, version("torch"), version("transformers"), platform.processor(), device
    identity = json.dumps([plan, *versions, torch.get_num_threads(), said])
    return hashlib.blake2b(identity.encode(), digest_size=16).hexdigest()


def site_noise(folder: Path, run: str, key: str) -> Noise:
    """Return the draws of an answer, by the secret of this state folder, which is made if there is none.

    Raises:
        UserError: the secret cannot be read or written, or is damaged.
    """
    path = folder / SECRET_FILE
    try:
        if not path.exists():
            _write_secret(path)
        secret = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read or written: {error.strerror}") from error
    if len(secret) != SECRET_BYTES:
        raise UserError(
            f"{path}: has {len(secret)} bytes; a secret has {SECRET_BYTES}. Remove it: what is trained again "
            "is then charged again"
        )
    return Noise(secret, (run, key))


def _write_secret(path: Path) -> None:
    """Write a new secret for this user alone, whole before it has its name. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    new = path.with_name(f"{path.name}.{os.getpid()}")
    new.unlink(missing_ok=True)
    file = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.write(file, os.urandom(SECRET_BYTES))
        os.fsync(file)
        os.link(new, path)
        fsync_folder(
            path.parent
        )  # a secret that a crash loses would give a plan that came before other noise
    finally:
        os.close(file)
        new.unlink()
