"""Find the files of a base model, check that they are complete, and identify them. Needs no torch."""

from __future__ import annotations

import functools
import hashlib
from http import HTTPStatus
from importlib.resources import files
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from fedflame.config.sections import EMBEDDED_MODEL
from fedflame.errors import UserError, one_line

HUB_TIMEOUT_SECONDS = 10.0
_FILES = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model")
"""What a model consists of: configuration, tokenizer and weights, and a chat template."""


def resolve_model(name_or_path: str) -> str:
    """Return the folder of the embedded model for its name, and any other name unchanged."""
    if name_or_path == EMBEDDED_MODEL:
        return str(files("fedflame") / "assets" / EMBEDDED_MODEL)
    return name_or_path


def model_config_path(name_or_path: str) -> Path:
    """Return the path of the model's config.json, or of its folder, without downloading weights.

    Raises:
        UserError: a hub id that cannot be reached.
    """
    source = resolve_model(name_or_path)
    if Path(source).exists() or source.endswith(".json"):
        return Path(source)
    try:
        return Path(huggingface_hub.hf_hub_download(source, "config.json", local_files_only=is_local(source)))
    except (OSError, ValueError) as error:
        raise UserError(load_error(name_or_path, error)) from error


def model_digest(name_or_path: str) -> str:
    """Return a hash (BLAKE2b, in hex) of the model's weights, configuration, tokenizer and chat template.

    Raises:
        UserError: a hub id that cannot be reached, or a file that cannot be read.
    """
    source = resolve_model(name_or_path)
    folder = Path(source) if Path(source).is_dir() else Path(downloaded(source))
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(path for pattern in _FILES for path in folder.glob(pattern)):
        try:
            with path.open("rb") as file:
                content = hashlib.file_digest(file, "blake2b").hexdigest()
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from error
        digest.update(f"{path.name} {content}\n".encode())
    return digest.hexdigest()


@functools.cache
def hub_refusal(name: str) -> str:
    """Return why the hub does not tell of this id, or nothing if it does.

    It is asked once: offline, transformers itself would retry for a minute.
    """
    try:
        huggingface_hub.HfApi().model_info(name, timeout=HUB_TIMEOUT_SECONDS)
    except Exception as error:  # the HTTP library, and so its errors, differ between versions
        return hub_reason(error)
    return ""


def hub_reason(error: Exception) -> str:
    """Return in a line what the hub, or the way to it, had against a request."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, GatedRepoError):
        return "it is gated; ask for access on its page at the hub, and set HF_TOKEN"
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, and it is not in the cache"
    if isinstance(error, RepositoryNotFoundError | HFValidationError):
        return "no such id, or a private one that needs HF_TOKEN"
    if status == HTTPStatus.TOO_MANY_REQUESTS:
        return "the hub answers 429, too many requests; wait, or set HF_TOKEN"
    return f"the hub cannot be reached ({one_line(first_line(error))})"


def is_local(source: str) -> bool:
    """Return whether to use only files on this machine: the model is a folder, or the hub does not answer."""
    return Path(source).is_dir() or bool(hub_refusal(source))


def downloaded(name: str) -> str:
    """Return the local folder of a hub id; download it if necessary."""
    patterns = [*_FILES]
    return huggingface_hub.snapshot_download(name, allow_patterns=patterns, local_files_only=is_local(name))


def has_tokenizer(folder: Path) -> bool:
    """Return whether a model folder has a tokenizer."""
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json"))


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or its class if it has no message."""
    return (str(error) or type(error).__name__).splitlines()[0]


def require_folder_complete(source: str) -> None:
    """Raise UserError if `source` is a folder without configuration, weights or tokenizer."""
    folder = Path(source)
    if not folder.is_dir():
        return
    if not (folder / "config.json").is_file():
        raise UserError(f"model {source}: the folder has no config.json")
    if not any(folder.glob("*.safetensors")):
        raise UserError(f"model {source}: the folder has no .safetensors weights")
    if not has_tokenizer(folder):
        raise UserError(f"model {source}: the folder has no tokenizer (tokenizer.json)")


def load_error(name_or_path: str, error: Exception) -> str:
    """Return the message for a model that could not be loaded."""
    if "trust_remote_code" in str(error):
        return (
            f"model {name_or_path}: cannot be loaded without running Python code of the model itself "
            "(auto_map), which fedflame never does; take a model of a family that transformers knows"
        )
    if Path(name_or_path).is_dir():
        return f"model {name_or_path}: cannot be loaded: {first_line(error)}"
    from_hub = ""
    if not name_or_path.startswith(("/", "./", "../")):
        reason = hub_refusal(name_or_path) or hub_reason(error)
        from_hub = f", and not loadable from the hub: {reason}"
    return f"model {name_or_path!r}: no such folder{from_hub}; use {EMBEDDED_MODEL!r}, a folder, or a hub id"


def tokenizer_error(name_or_path: str, folder: Path, error: Exception) -> str:
    """Return the message for a tokenizer that could not be loaded from a folder."""
    if (folder / "tokenizer.model").is_file() and not (folder / "tokenizer.json").is_file():
        return (
            f"model {name_or_path}: its tokenizer.model cannot be read ({first_line(error)}); pip install "
            "sentencepiece protobuf, or put a tokenizer.json beside it"
        )
    return load_error(name_or_path, error)
