"""Describe an exported folder: the facts of a run, and `fedflame.json`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fedflame import __version__
from fedflame.config.sections import AdapterConfig
from fedflame.data.encoder import PromptForm
from fedflame.moe.families import MoELayer
from fedflame.run_files.task_scores import TaskScores
from fedflame.strategies.base import ServerState

FORMAT_VERSION = 2
TEMPLATE_FILE = "chat_template.jinja"
"""Where tokenizers keep their chat template."""


@dataclass(frozen=True)
class CardFacts:
    """What a model card says beside how the model was trained."""

    dataset: str = ""
    """Id of the data set on the hub; empty for data that lies elsewhere, which a card does not name."""
    held_out: Mapping[int, Mapping[str, float]] = field(default_factory=dict)
    """k -> measure -> value on the held-out rows, after the round that is exported."""
    tasks: TaskScores | None = None
    """Scores in tasks of lm-evaluation-harness after that round."""
    best_rounds: Mapping[int, int] = field(default_factory=dict)
    """k -> the round that is exported, where that is its best; empty where the last is."""
    epsilon: float | None = None
    """The most that training told of a row of a client; None if the run was not private."""
    delta: float = 0.0
    """Beside `epsilon`."""
    hub_model_id: str = ""
    """Where the folder is to be on the hub."""
    license: str = ""
    license_name: str = ""
    license_link: str = ""

    def at(self, k: int) -> CardFacts:
        """Return the facts of what runs k experts per token alone."""
        held_out = {one: value for one, value in self.held_out.items() if one == k}
        by_k = [one for one in self.tasks.by_k if one.active_experts == k] if self.tasks else []
        tasks = self.tasks.model_copy(update={"by_k": by_k}) if self.tasks and by_k else None
        rounds = {one: value for one, value in self.best_rounds.items() if one == k}
        return replace(self, held_out=held_out, tasks=tasks, best_rounds=rounds)


@dataclass(frozen=True)
class TrainedRun:
    """The facts about a run that an export needs."""

    base_model: str
    """Name, hub id or folder of the base model."""
    adapter: AdapterConfig
    """Rank and scale of the run. Merged factors add ranks in the export."""
    method: str
    """The method in words, with its paper."""
    strategy: Mapping[str, Any]
    """The section `strategy` of the configuration."""
    num_clients: int
    active_experts: Sequence[int]
    """Experts per token that the clients afford, as configured."""
    local_work: str
    """What each client does in each round, such as "at most 80 steps"."""
    learning_rate: float
    rounds: int
    """Number of federated rounds that were run."""
    prompt: PromptForm
    """How the rows became text."""
    card: CardFacts = CardFacts()


def run_facts(state: ServerState, run: TrainedRun, layers: Sequence[MoELayer]) -> dict[str, Any]:
    """Return the content of `fedflame.json`."""
    best = {"best_rounds": dict(run.card.best_rounds)} if run.card.best_rounds else {}
    return best | {
        "format_version": FORMAT_VERSION,
        "fedflame_version": __version__,
        "base_model": run.base_model,
        "strategy": dict(run.strategy),
        "rounds": run.rounds,
        "num_experts_per_tok": layers[0].num_experts_per_tok,
        "tiers": sorted(state.rescalers, reverse=True),
    }
