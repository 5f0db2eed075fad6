"""The run configuration: frozen models at the edge; every field is one flat scalar.

A TOML file has one table per section; `--set section.key=value` overrides it. Engines carry flat
scalars only, so a list is written out as a string (`"8,4,2,1"`).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from fedflame.choices import Checkpointed, CountedRows, Trainable, UpdateDtype
from fedflame.errors import UserError
from fedflame.k_rotation import KRotation, experts_of_round
from fedflame.settings import Section, read_toml, refuse_unknown_keys, validated

EMBEDDED_MODEL = "olmoe-tiny"
SKILLS = "skills"


class ModelConfig(Section):
    model_name_or_path: str = EMBEDDED_MODEL
    """`olmoe-tiny` (embedded), a folder in Hugging Face layout, or a hub id."""
    adapter_name_or_path: str = ""
    """Folder of a LoRA adapter, of fedflame or PEFT, that the run goes on from; empty to start anew."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the frozen base; `auto` takes bfloat16 or float16 where the machine multiplies it clearly
    faster. With float16 the loss is scaled, and a step whose gradients overflow is skipped."""
    memory_map: bool = False
    """Map the frozen base from files, made once per model: for a model larger than memory, and shared
    by all processes of the machine."""


class AdapterConfig(Section):
    r: Annotated[int, Field(ge=1)] = 8
    """LoRA rank of every projection; a method may give a client less."""
    lora_alpha: Annotated[float, Field(gt=0)] = 16.0
    """The update is scaled by lora_alpha / r, also where a client trains a smaller rank."""
    target_modules: str = "q_proj,k_proj,v_proj,o_proj"
    """Attention projections with LoRA, comma-separated; empty for experts only."""

    def attention_modules(self) -> list[str]:
        """The names in `target_modules`."""
        return [name.strip() for name in self.target_modules.split(",") if name.strip()]


class DataConfig(Section):
    dataset_name: str = SKILLS
    """`skills`, a .jsonl, .jsonl.gz, .parquet or .csv file, or a hub id."""
    split: str = "train"
    """Split of a hub data set."""
    dataset_config_name: str = ""
    """Configuration of a hub data set that has several, such as `main`."""
    instruction_field: str = ""
    """Column of the instruction; empty to recognise Alpaca, Dolly and question/answer names."""
    context_field: str = ""
    """Column of the context or input."""
    response_field: str = ""
    """Column of the response."""
    category_field: str = ""
    """Label column for the partition and for evaluation by category."""
    max_rows: Annotated[int, Field(ge=0)] = 0
    """Use a seeded sample of at most so many rows; 0 for all. Skills: rows to generate."""
    max_length: Annotated[int, Field(ge=8)] = 256
    """Tokens per row, prompt and response; longer rows are truncated and counted."""
    partition: Literal["iid", "dirichlet", "by_label"] = "dirichlet"
    """How rows are split over the clients."""
    alpha: Annotated[float, Field(gt=0)] = 5.0
    """Concentration of the Dirichlet partition; smaller is more skewed."""


class ClientsConfig(Section):
    num_clients: Annotated[int, Field(ge=1)] = 4
    """Number of clients."""
    active_experts: str = "8,4,2,1"
    """Experts per token that the clients afford, repeated in turn over the clients."""
    ranks: str = ""
    """LoRA ranks that the clients afford under a method that adapts the rank (hetlora, flexlora, flora),
    repeated in turn; empty for the share of adapter.r that they afford of the model's experts."""

    @field_validator("active_experts", "ranks")
    @classmethod
    def _positive_integers(cls, value: str, info: ValidationInfo) -> str:
        if value or info.field_name == "active_experts":
            parse_tiers(value)
        return value


class TrainingConfig(Section):
    learning_rate: Annotated[float, Field(gt=0)] = 5e-3
    """Of AdamW in round 1, constant within a round."""
    lr_scheduler_type: Literal["constant", "cosine"] = "cosine"
    """How the learning rate goes on over the rounds; `cosine` falls towards zero after the last."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Of AdamW, on experts that saw a token."""
    per_device_train_batch_size: Annotated[int, Field(ge=1)] = 8
    """Rows per optimizer step, unless `tokens_per_step` is set."""
    tokens_per_step: str = ""
    """Tokens per optimizer step: a batch has as many rows of similar length as fit, padding counted, and
    at least one. One number for every client, or several, in turn over the clients, such as `1024,2048`:
    more where few experts run. Empty for `per_device_train_batch_size` rows."""
    max_steps: Annotated[int, Field(ge=1)] = 80
    """Optimizer steps per client and round."""
    budget: Literal["steps", "compute"] = "steps"
    """`steps`: every client takes `max_steps`, as in the paper. `compute`: every client spends the FLOPs
    of `max_steps` at the number of experts that it affords and `adapter.r`, so that a method that runs
    more experts there takes fewer steps, and one that runs fewer takes more."""
    proximal_mu: Annotated[float, Field(ge=0)] = 0.0
    """FedProx (arXiv 1812.06127), under every method: mu/2 times the squared distance from the adapter
    that the client was given is added to its objective; 0 for none."""
    gradient_checkpointing: Checkpointed = "none"
    """Keep less for the backward, which computes it again: less memory, more time, the same result.
    `experts`: all but the experts' activations, the largest part, which costs their first product again;
    `layers`: only the input of each layer, which costs a second forward."""

    @field_validator("tokens_per_step")
    @classmethod
    def _tokens_are_positive_integers(cls, value: str) -> str:
        if value:
            parse_tiers(value)
        return value


RANK_METHODS = ("hetlora", "flexlora", "flora")
"""Each client runs all K experts and trains the rank that it affords."""
MERGING_METHODS = ("flora", "fedex_lora")
"""Each round adds the ranks of its clients to the factors that are merged into the base."""
TRAINED_HALVES: dict[str, tuple[Trainable, ...]] = {"ffa_lora": ("B",), "rolora": ("B", "A")}
"""Of methods whose clients train and send one half of the adapter, in turn where there are two."""
_ALIKE = {"active_experts", "rank", "counted_rows"}
METHOD_OPTIONS = {
    "flame": {
        "temperature",
        "rescaler",
        "count_normalization",
        "tier_affinity",
        "k_rotation",
        "learning_rate_exponent",
        "counted_rows",
    },
    "fedavg": _ALIKE,
    "ffa_lora": _ALIKE,
    "rolora": _ALIKE,
    "fedex_lora": _ALIKE,
    "hetlora": {"rank_decay", "rank_penalty"},
    "flexlora": {"counted_rows"},
    "flora": {"counted_rows"},
}
"""The options of `StrategyConfig` that each method reads; the others must be left at their defaults."""


class StrategyConfig(Section):
    name: Literal["flame", "fedavg", "ffa_lora", "rolora", "fedex_lora", "hetlora", "flexlora", "flora"] = (
        "flame"
    )
    """The federated method; docs/strategies.md has all of them side by side."""
    temperature: Annotated[float, Field(ge=0, le=8)] = 1.0
    """FLAME: exponent t on the activation frequency; 0 gives FedAvg weights, the paper finds 2 to 4
    good. The larger t, the more the clients with large k decide. Above 8 the weights of
    rarely used experts would vanish in fp32."""
    rescaler: Literal["learned", "none", "static", "mass"] = "learned"
    """FLAME: how the routed output is rescaled on clients with k < K."""
    count_normalization: Literal["token", "slot"] = "slot"
    """FLAME: frequency per routed slot, k of them to a token, or per token as in the paper, where a client
    with large k has more weight for it."""
    tier_affinity: Annotated[float, Field(ge=0, le=1)] = 0.7
    """FLAME: the server keeps an adapter for every k of the clients. An update that was trained with k'
    counts in that of k by this number to the power of the doublings between k and k': 1, 0.7, 0.49 and
    so on. With 1 there is one adapter for all, as in the paper; with 0 every k learns from its own only."""
    k_rotation: Literal["auto", "none", "smaller", "all"] = "auto"
    """FLAME: the k that a client trains with. `smaller`: every second time what it affords, between them the
    smaller k of other clients in turn; `all`: between them the larger ones, too, with fewer steps, so that a
    round costs no more (who affords the least keeps to that); `none`: what it affords, as in the paper.
    `auto`: `all` where `training.budget` is compute, so that k says how much a client can spend, else
    `smaller`."""
    learning_rate_exponent: Annotated[float, Field(ge=0, le=1)] = 0.0
    """FLAME: a client that trains with k experts per token has the learning rate times (K/k) to this power;
    0 for the same at every k."""
    active_experts: str = "min"
    """FedAvg, FFA-LoRA, RoLoRA, FedEx-LoRA: the k of every client: `min` (the smallest client's, the
    paper's baseline), `full` (the model's) or a number."""
    rank: str = "full"
    """FedAvg, FFA-LoRA, RoLoRA, FedEx-LoRA: the LoRA rank of every client: `full` (adapter.r), `min` (the
    smallest client's) or a number."""
    counted_rows: CountedRows = "trained"
    """All but HetLoRA: a client's |D_i|, its weight in a mean: `held`, all its rows, as published, or
    `trained`, those it trained on in the round, each once. They differ where `training.max_steps` do not go
    over all rows: with `held` a client with many rows counts for more than it has done."""
    rank_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """HetLoRA: gamma of rank self-pruning, such as 0.9: a client whose last ranks, those after the first
    gamma r_i, shrank in a round goes on without them; 0 for none."""
    rank_penalty: Annotated[float, Field(ge=0)] = 0.01
    """HetLoRA with rank_decay: weight of the penalty on those ranks in the client's objective."""

    @field_validator("active_experts", "rank")
    @classmethod
    def _min_full_or_number(cls, value: str) -> str:
        if value not in ("min", "full") and not (value.isdecimal() and int(value) >= 1):
            raise ValueError("must be 'min', 'full' or an integer of at least 1")
        return value


class ServerConfig(Section):
    num_server_rounds: Annotated[int, Field(ge=1)] = 10
    """Federated rounds."""
    fraction_train: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the clients sampled in each round."""
    min_clients: Annotated[int, Field(ge=1)] = 1
    """Usable updates a round needs; with fewer the run stops and keeps its checkpoint."""


class CommunicationConfig(Section):
    update_dtype: UpdateDtype = "float32"
    """How clients send what they learned: as it is, or rounded to bfloat16, or to int8 with a scale per
    expert and matrix. What rounding takes from an update is added to the client's next one."""


class EvaluationConfig(Section):
    split: Literal["test", "validation"] = "test"
    """Which held-out rows to score. `validation`: rows to tune on, with the same training rows and no row
    in common with these or with `test`. Of a file or hub data set they are taken from what `data.max_rows`
    leaves out."""
    rows_per_category: Annotated[int, Field(ge=1)] = 20
    """Held-out rows per category."""
    evaluate_every: Annotated[int, Field(ge=0)] = 1
    """Rounds between evaluations; 0 for before and after the run only."""
    generate_every: Annotated[int, Field(ge=0)] = 3
    """Rounds between scores by generation, if they are evaluated; 0 for before and after the run only."""
    max_new_tokens: Annotated[int, Field(ge=0)] = 24
    """Tokens generated per row; 0 for loss alone."""
    batch_size: Annotated[int, Field(ge=1)] = 50
    """Rows per evaluation batch."""


class RunConfig(Section):
    """The whole configuration of one run."""

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    output_dir: str = "runs/first-light"
    model: ModelConfig = ModelConfig()
    adapter: AdapterConfig = AdapterConfig()
    data: DataConfig = DataConfig()
    clients: ClientsConfig = ClientsConfig()
    training: TrainingConfig = TrainingConfig()
    strategy: StrategyConfig = StrategyConfig()
    server: ServerConfig = ServerConfig()
    communication: CommunicationConfig = CommunicationConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    def tiers(self) -> list[int]:
        """Active experts k of each client, in client order."""
        return self._in_turn(self.clients.active_experts)

    def tokens_per_step(self) -> list[int]:
        """Tokens per optimizer step of each client, in client order; 0 where rows count."""
        return self._in_turn(self.training.tokens_per_step or "0")

    def _in_turn(self, text: str) -> list[int]:
        cycle = [int(part) for part in text.split(",")]
        return [cycle[client % len(cycle)] for client in range(self.clients.num_clients)]

    def ranks(self, num_experts_per_tok: int) -> list[int]:
        """LoRA rank that each client affords on a model with this K, in client order."""
        if self.clients.ranks:
            return self._in_turn(self.clients.ranks)
        return [max(1, self.adapter.r * k // num_experts_per_tok) for k in self.tiers()]

    def trained_experts(self, num_experts_per_tok: int, round_number: int) -> list[int]:
        """The k each client trains with in a round, from 1, on a model with this K, in client order.

        Methods other than FLAME overrule budgets, in every round alike.
        """
        if self.strategy.name == "flame":
            return experts_of_round(self.tiers(), self.k_rotation(), round_number)
        chosen = "full" if self.strategy.name in RANK_METHODS else self.strategy.active_experts
        return _alike(chosen, self.tiers(), num_experts_per_tok)

    def k_rotation(self) -> KRotation:
        """`strategy.k_rotation`, once `auto` has been decided."""
        if self.strategy.k_rotation != "auto":
            return self.strategy.k_rotation
        return "all" if self.training.budget == "compute" else "smaller"

    def trained_ranks(self, num_experts_per_tok: int) -> list[int]:
        """The LoRA rank each client trains on a model with this K, in client order."""
        ranks = self.ranks(num_experts_per_tok)
        if self.strategy.name in RANK_METHODS:
            return ranks
        return _alike(self.strategy.rank, ranks, self.adapter.r)

    def evaluated_experts(self, num_experts_per_tok: int) -> list[int]:
        """Every k that a client affords or trains with on a model with this K, largest first."""
        return sorted({*self.tiers(), *self.trained_experts(num_experts_per_tok, 1)}, reverse=True)

    def deployed(self, num_experts_per_tok: int) -> list[tuple[int, int]]:
        """The k and rank that each client uses the global model at, on a model with this K, in client order.

        A method that runs K experts on every client gives all of them K; the others let each client run the
        k that it affords. A rank is what is left of the adapter where the method cuts it, else the run's.
        """
        full, n = num_experts_per_tok, self.clients.num_clients
        cuts = self.strategy.name in RANK_METHODS and self.strategy.name not in MERGING_METHODS
        runs_all = self.strategy.name != "flame" and min(self.trained_experts(full, 1)) == full
        experts = [full] * n if runs_all else self.tiers()
        return list(zip(experts, self.ranks(full) if cuts else [self.adapter.r] * n, strict=True))

    def cut_deployments(self, num_experts_per_tok: int) -> list[tuple[int, int]]:
        """Those of `deployed` with less than the run's rank, each once, largest first."""
        deployed = self.deployed(num_experts_per_tok)
        return sorted({(k, rank) for k, rank in deployed if rank < self.adapter.r}, reverse=True)

    def learning_rate(self, round_number: int) -> float:
        """Of one round, counted from 1."""
        training, rounds = self.training, self.server.num_server_rounds
        if training.lr_scheduler_type == "constant":
            return training.learning_rate
        return training.learning_rate * (1 + math.cos(math.pi * (round_number - 1) / rounds)) / 2

    def is_due(self, every: int, round_number: int) -> bool:
        """Whether something that is done every so many rounds, and before and after the run, is due."""
        return round_number in (0, self.server.num_server_rounds) or (every > 0 and round_number % every == 0)

    def error_feedback(self) -> bool:
        """Whether clients keep what rounding took for their next update.

        Not under FLoRA, whose clients start every round from other factors.
        """
        return self.communication.update_dtype != "float32" and self.strategy.name != "flora"

    def clients_per_round(self) -> int:
        """Clients sampled in each round."""
        return max(1, round(self.server.fraction_train * self.clients.num_clients))


def _alike(chosen: str, afforded: list[int], full: int) -> list[int]:
    """`min`, `full` or a number, for every client."""
    value = {"min": min(afforded), "full": full}.get(chosen) or int(chosen)
    return [value] * len(afforded)


def parse_tiers(text: str) -> list[int]:
    """`"8,4,2,1"` as integers; ValueError on anything that is not a list of positive integers."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) >= 1 for part in parts):
        raise ValueError('must be integers of at least 1, comma-separated, such as "8,4,2,1"')
    return [int(part) for part in parts]


def load_config(path: Path | None, overrides: list[str]) -> RunConfig:
    """The configuration of a TOML file (None: the defaults) with `section.key=value` overrides.

    Raises UserError for a missing or broken file, an unknown key or a value that is not allowed.
    """
    return _resolve(read_toml(path) if path is not None else {}, overrides)


def with_overrides(config: RunConfig, overrides: list[str]) -> RunConfig:
    """The configuration with `section.key=value` overrides; raises UserError as `load_config` does."""
    return _resolve(config.model_dump(), overrides)


def _resolve(values: dict[str, Any], overrides: list[str]) -> RunConfig:
    for override in overrides:
        _apply_override(values, override)
    refuse_unknown_keys(values, RunConfig, "config")
    config = validated(RunConfig, values, "config")
    _refuse_contradictions(config)
    return config


def _refuse_contradictions(config: RunConfig) -> None:
    clients = config.clients.num_clients
    in_turn = {
        "clients.active_experts": config.clients.active_experts,
        "clients.ranks": config.clients.ranks,
        "training.tokens_per_step": config.training.tokens_per_step,
    }
    for key, text in in_turn.items():
        entries = text.count(",") + 1
        if entries > clients:
            raise UserError(
                f"config: {key} has {entries} entries for clients.num_clients = {clients}; "
                "it must have at most one per client"
            )
    for key, value in (("clients.ranks", config.clients.ranks), ("strategy.rank", config.strategy.rank)):
        largest = max((int(part) for part in value.split(",") if part.strip().isdecimal()), default=0)
        if largest > config.adapter.r:
            raise UserError(f"config: {key} = {value!r}: must be at most adapter.r = {config.adapter.r}")
    _refuse_options_of_other_methods(config.strategy)
    if config.server.min_clients > config.clients_per_round():
        raise UserError(
            f"config: server.min_clients = {config.server.min_clients}: server.fraction_train = "
            f"{config.server.fraction_train} samples only {config.clients_per_round()} of {clients} clients"
        )


def _refuse_options_of_other_methods(strategy: StrategyConfig) -> None:
    for key in sorted(set.union(*METHOD_OPTIONS.values()) - METHOD_OPTIONS[strategy.name]):
        value, default = getattr(strategy, key), StrategyConfig.model_fields[key].default
        if value != default:
            methods = ", ".join(name for name, options in METHOD_OPTIONS.items() if key in options)
            raise UserError(
                f"config: strategy.{key} = {value!r}: {strategy.name} has no such option; {methods} "
                f"{'have' if ',' in methods else 'has'} it (leave it at {default!r})"
            )


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals:
        raise UserError(f"--set {override!r}: must be section.key=value, such as data.alpha=0.1")
    section, dot, name = key.strip().partition(".")
    if not dot:
        values[section] = text.strip()
        return
    target = values.setdefault(section, {})
    if not isinstance(target, dict):
        raise UserError(f"config: unknown key {key.strip()!r}; {section} is a value, not a section")
    target[name] = text.strip()
