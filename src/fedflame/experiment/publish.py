"""Push an exported folder to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from fedflame import __version__
from fedflame.base.files import first_line
from fedflame.errors import UserError, one_line

_REASONS = {
    401: "the hub does not accept the token (HF_TOKEN, or that of `hf auth login`)",
    403: "the token may not write there",
}


def require_hub_id(name: str) -> None:
    """Raises UserError where a name cannot be that of a repository of the hub, as USER/NAME."""
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"--hub-model-id {name!r}: {first_line(error)}") from error
    if "/" not in name:
        raise UserError(f"--hub-model-id {name!r}: must be USER/NAME or ORGANISATION/NAME")


def require_login() -> None:
    """Raises UserError where nothing can be pushed: without a token, or offline."""
    if huggingface_hub.is_offline_mode():
        raise UserError("--push-to-hub: HF_HUB_OFFLINE is set; without --push-to-hub the folder is written")
    if huggingface_hub.get_token() is None:
        raise UserError("--push-to-hub: no token; set HF_TOKEN to one with write access, or `hf auth login`")


def push(folder: Path, hub_model_id: str, private: bool) -> str:
    """Upload a folder as a repository of the hub, which is made if there is none, and return its address.

    Args:
        folder: what to upload; it stays as it is. Other files of the repository stay, too.
        hub_model_id: USER/NAME.
        private: make a new repository private; otherwise the account's own default holds.

    Raises:
        UserError: the hub refuses it, or cannot be reached.
    """
    api = huggingface_hub.HfApi()
    try:
        address = api.create_repo(hub_model_id, private=private or None, exist_ok=True)
        api.upload_folder(
            repo_id=hub_model_id, folder_path=folder, commit_message=f"Export of fedflame {__version__}"
        )
    except Exception as error:  # the HTTP library, and so its errors, differ between versions
        status = getattr(getattr(error, "response", None), "status_code", None)
        reason = _REASONS[status] if status in _REASONS else one_line(str(error) or type(error).__name__)
        raise UserError(
            f"{folder} is written, but not pushed to {hub_model_id}: {reason}; "
            f"`hf upload {hub_model_id} {folder}` tries again"
        ) from error
    return str(address)
