"""Configurations by their flat keys, as files, and as the one line that refuses them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.refusals import refusal_of

from fedflame.config.load import load_config
from fedflame.config.run_config import RunConfig


def flat(config: RunConfig) -> dict[str, Any]:
    """Every value under its flat key."""
    values: dict[str, Any] = {}
    for name, value in config.model_dump().items():
        values |= (
            {f"{name}.{key}": inner for key, inner in value.items()}
            if isinstance(value, dict)
            else {name: value}
        )
    return values


def message(*overrides: str, path: Path | None = None) -> str:
    return refusal_of(load_config, path, list(overrides))


def toml(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "config.toml"
    path.write_text(text, encoding="utf-8")
    return path
