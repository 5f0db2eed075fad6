"""The recipes of the models: the same architecture, text and schedule at two sizes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers import OlmoeConfig

VOCABULARY_SIZE = 4096
CONTEXT = 256
HERE = Path(__file__).parent


@dataclass(frozen=True)
class Recipe:
    """How to train one model: its sizes, its text, its steps and its learning rates."""

    folder: Path
    """Folder of the finished model."""
    purpose: str
    """What the model is for; its card quotes this."""
    machine: str
    """The machine on which the published model was trained."""
    config: OlmoeConfig
    sequences_per_step: int
    dense_from_step: int
    """Before this step the skills text has single statements; from it on, mostly dense paragraphs."""
    hard_from_step: int
    """From this step on `HARD_WRITERS` write the paragraphs, and the learning rate rises again."""
    steps: int
    skills_share: float
    """Share of skills text in the training tokens before `dense_from_step`."""
    dense_share: float
    """Share of skills text in the training tokens from `dense_from_step` on."""
    peak_learning_rate: float
    second_peak_learning_rate: float

    @property
    def name(self) -> str:
        """The name of the model, which is that of its folder."""
        return self.folder.name

    @property
    def results(self) -> Path:
        """File with the measurements of the training."""
        return HERE / "results" / f"{self.name}.json"

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one batch."""
        return self.sequences_per_step * CONTEXT


def olmoe(hidden_size: int, expert_width: int) -> OlmoeConfig:
    """Return an OLMoE config with 4 layers of 32 experts and K = 8."""
    return OlmoeConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=hidden_size,
        intermediate_size=expert_width,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_experts=32,
        num_experts_per_tok=8,
        norm_topk_prob=False,
        router_aux_loss_coef=0.02,
        tie_word_embeddings=True,
        max_position_embeddings=CONTEXT,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )


TINY = Recipe(
    folder=HERE.parent / "src" / "fedflame" / "assets" / "olmoe-tiny",
    purpose="demonstrations and tests of federated fine-tuning of sparse mixtures of experts, without a "
    "download.\nIt is the base model of `fedflame run`.",
    machine="2 cores of an AMD EPYC with AVX-512 bf16",
    config=olmoe(hidden_size=128, expert_width=48),
    sequences_per_step=8,
    dense_from_step=4000,
    hard_from_step=12_800,
    steps=15_800,
    skills_share=0.4,
    dense_share=0.6,
    peak_learning_rate=2e-3,
    second_peak_learning_rate=1e-3,
)
SMALL = Recipe(
    folder=HERE / "olmoe-small",
    purpose="experiments with federated fine-tuning of sparse mixtures of experts.\nIt is the base model of "
    "`benchmarks/larger-base`, and not in the package.",
    machine="one NVIDIA H200, with another training beside it (torch 2.11.0)",
    config=olmoe(hidden_size=256, expert_width=64),
    sequences_per_step=64,
    dense_from_step=1600,
    hard_from_step=5200,
    steps=6400,
    skills_share=0.2,
    dense_share=0.3,
    peak_learning_rate=3e-3,
    second_peak_learning_rate=1.5e-3,
)
RECIPES = {recipe.name: recipe for recipe in (TINY, SMALL)}
