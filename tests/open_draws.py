"""Noise that follows from what it is for, so that two runs draw the same."""

from __future__ import annotations

import numpy as np
import pytest

from fedflame.privacy.noise import Noise
from fedflame.seeds import derive_seed


def draw_openly(monkeypatch: pytest.MonkeyPatch) -> None:
    def open_draws(self: Noise, count: int, *purpose: int | str) -> np.ndarray:
        return np.random.default_rng(derive_seed(*purpose)).uniform(1e-12, 1, count)

    monkeypatch.setattr(Noise, "_uniform", open_draws)
