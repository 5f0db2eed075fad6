"""What is measured: in full on a card, and small to see that the program works."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from fedflame.base.files import model_config_path
from fedflame.bench.block import Geometry
from fedflame.bench.step import ADAPTER, olmoe_config

ROOT = Path(__file__).parents[2]
ACTIVE = (8, 4, 2, 1)
"""The k of every table, K first."""


@dataclass(frozen=True)
class Sizes:
    """The sizes of all stages."""

    device: str
    config: Path
    """Folder of the geometry, in Hugging Face layout."""
    layers: int
    tokens: tuple[int, ...]
    """Of a block and of a step, the most important first."""
    row: int
    """Tokens of each row of a step."""
    product: int
    """The large product whose rate is the ceiling has three sides of this size."""
    copied: int
    """Bytes of the copy."""
    chunks: tuple[int, ...]
    """Tokens whose logits exist at a time."""
    repeats: int
    loss_steps: int
    run: tuple[str, ...]
    """Settings of a real run."""
    data: Path | None = None
    """Rows of instructions for one more run."""

    @property
    def geometry(self) -> Geometry:
        """One block."""
        config = olmoe_config(self.config, 1)
        sizes = config.hidden_size, config.intermediate_size, config.num_experts
        return Geometry(*sizes, ADAPTER.r, "bfloat16", self.device)


FULL = Sizes(
    device="cuda",
    config=ROOT / "configs" / "models" / "OLMoE-1B-7B-0924",
    layers=16,
    tokens=(8192, 32768, 2048),
    row=512,
    product=8192,
    copied=2**31,
    chunks=(128, 2048, 4096),
    repeats=7,
    loss_steps=50,
    run=(
        "data.max_rows=2000",
        "server.num_server_rounds=2",
        "training.max_steps=15",
        "evaluation.rows_per_category=5",
    ),
)
SMALL = replace(
    FULL,
    device="cpu",
    config=model_config_path("olmoe-tiny"),
    layers=1,
    tokens=(16,),
    row=8,
    product=64,
    copied=2**16,
    chunks=(5, 32),
    repeats=1,
    loss_steps=2,
    run=(
        "data.max_rows=100",
        "server.num_server_rounds=1",
        "training.max_steps=1",
        "evaluation.rows_per_category=1",
    ),
)
