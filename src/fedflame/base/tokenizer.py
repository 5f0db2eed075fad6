"""Load the tokenizer of a model folder to count tokens, if possible without torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedflame.base.files import tokenizer_error
from fedflame.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model folder.

    transformers loads torch to find a tokenizer's class. If there is a tokenizer.json,
    PreTrainedTokenizerFast counts tokens with it, whatever the class is, and torch is not needed.

    Raises:
        UserError: the tokenizer cannot be loaded.
    """
    try:
        tokenizer: Any = _tokenizer_class(folder).from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # of transformers or tokenizers, whatever is in the files
        raise UserError(tokenizer_error(str(folder), folder, error)) from error
    loaded: PreTrainedTokenizerBase = tokenizer
    return loaded


def _tokenizer_class(folder: Path) -> Any:
    if (folder / "tokenizer.json").is_file():
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast
    from transformers import AutoTokenizer

    return AutoTokenizer
