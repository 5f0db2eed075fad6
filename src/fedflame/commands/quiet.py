"""No progress bars and no advice from libraries between our own lines."""

from __future__ import annotations

import os


def quiet_libraries() -> None:
    """Before libraries are imported: they read these variables then."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler
