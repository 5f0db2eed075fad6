"""How a site carries out a private plan: its terms, the units of its rows, and the secret of its noise."""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import torch

from fedflame import __version__
from fedflame.atomic_file import kept_secret
from fedflame.base.processor import processor
from fedflame.data.conversations import Conversation
from fedflame.messages import RoundPlan
from fedflame.privacy.noise import SECRET_BYTES, Noise
from fedflame.privacy.terms import Terms, terms_of
from fedflame.trainer.refusal import Refusal
from fedflame.trainer.site import Site

SECRET_FILE = "noise.key"
_COMPUTING = ("torch", "transformers", "peft", "numpy")
"""The packages of whose version the bits of a sum may depend."""


def required_terms(site: Site, plan: RoundPlan, units: int) -> Terms | None:
    """Return the terms of a plan for a site with so many rows, or persons; None for one that is not private.

    Raises:
        Refusal: the site's file asks for privacy, and the plan has none.
        UserError: see `privacy.terms.terms_of`.
    """
    if plan.is_private:
        return terms_of(plan, units)
    if site.privacy.only_private:
        raise Refusal("this site's file asks for privacy of rows; set privacy.unit = 'row'")
    return None


def release_key(plan: str, rows: Sequence[Conversation], device: str) -> str:
    """Return what identifies an answer: the plan, and all by which the sums before the noise could differ.

    Other rows, versions or processors give other sums. With the same noise, the difference of two answers
    would have none. On a card even the same sums come out otherwise the next time, in their last bits: there
    no two answers have one key.

    Args:
        plan: the digest of plan and job.
        rows: of the site.
        device: that trains.
    """
    said = [[*row.to_values(), row.owner] for row in rows]
    versions = [__version__, *map(version, _COMPUTING)]
    machine = device, processor(), torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()
    once = "" if device == "cpu" else secrets.token_hex(16)
    identity = json.dumps([plan, versions, machine, once, said])
    return hashlib.blake2b(identity.encode(), digest_size=16).hexdigest()


def site_noise(folder: Path, run: str, key: str) -> Noise:
    """Return the draws of an answer, by the secret of this state folder, which is made if there is none.

    Without the secret, what is trained again has other draws, and is charged again.

    Raises:
        UserError: the secret cannot be read or written, or is damaged.
    """
    return Noise(kept_secret(folder / SECRET_FILE, SECRET_BYTES), (run, key))
