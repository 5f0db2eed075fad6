"""The run folder of a small synthetic run."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.report.synthetic import synthetic_events, write_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "first-light", synthetic_events())
