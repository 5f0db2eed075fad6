"""Every family clips by norms as it does one row at a time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.families import FAMILIES, VOCABULARY, tiny
from tests.random_rows import random_rows
from tests.tiny_models import ALPHA, random_adapter

from fedflame.config.sections import AUTO
from fedflame.cost.model_shape import attention_targets, read_model_shape
from fedflame.moe.adapted_model import AdaptedModel
from fedflame.training.clipped_sums import clipped_sums

pytestmark = pytest.mark.slow

CLIP = 0.05
LENGTHS = (13, 9, 17, 5, 21)


@pytest.mark.parametrize("family", FAMILIES)
def test_by_norms_the_sum_is_that_of_one_row_at_a_time(family: str, tmp_path: Path) -> None:
    model = tiny(family)
    model.config.save_pretrained(tmp_path)
    adapted = AdaptedModel(model, 2, ALPHA, attention_targets(read_model_shape(tmp_path), AUTO))
    layers = len(adapted.loras)
    adapted.load(random_adapter(adapted), torch.linspace(0.8, 1.2, layers))
    units = [[row] for row in random_rows(LENGTHS, VOCABULARY)]
    with adapted.training(1):
        one, other = (clipped_sums(adapted, units, CLIP, clipping, 0) for clipping in ("row", "ghost"))
    norm = torch.cat([value.flatten() for value in one.values()]).double().norm()
    assert CLIP < float(norm) <= len(units) * CLIP, "rows are clipped"
    for name, value in one.items():
        assert float((other[name] - value).norm()) < 1e-4 * max(float(value.norm()), 1e-2 * float(norm)), name
