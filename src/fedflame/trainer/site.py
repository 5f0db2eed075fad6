"""The site's file: what its owner has, affords and allows. It never leaves the site."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, field_validator

from fedflame.config.sections import EMBEDDED_MODEL
from fedflame.config.settings import Section, SettingsFile, load_file
from fedflame.config.words import Checkpointed

SITE_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"


class SiteData(Section):
    """The rows that are trained on."""

    dataset_name: str
    """A .jsonl, .jsonl.gz, .parquet or .csv file, from the folder of the site's file, or a hub id."""
    split: str = "train"
    """Split of a hub data set."""
    dataset_config_name: str = ""
    """Configuration of a hub data set that has several."""
    instruction_field: str = ""
    """Column of the instruction; empty to recognise Alpaca, Dolly and question/answer names."""
    context_field: str = ""
    """Column of the context or input."""
    response_field: str = ""
    """Column of the response."""


class SiteTrainer(Section):
    """The machine."""

    active_experts: Annotated[int, Field(ge=1)]
    """Experts per token that it affords."""
    max_active_experts: Annotated[int, Field(ge=0)] = 0
    """Experts per token that a plan may ask for, in a turn with fewer steps (`strategy.k_rotation = "all"`);
    more is refused. 0 for no more than `active_experts`."""
    socket: str = "trainer.sock"
    """Where the engine's processes ask, from the folder of the site's file; at most about 100 letters."""
    state_dir: str = "state"
    """What must survive a crash: the last answers, and what rounding took from them."""
    kept_runs: Annotated[int, Field(ge=1)] = 10
    """Runs of which that is kept: when another begins, the one that was asked for longest ago goes."""
    gradient_checkpointing: Checkpointed = "none"
    """Keep less for the backward, with the same result."""


class SiteLimits(Section):
    """What a plan may ask for; more is refused with the reason."""

    max_rounds: Annotated[int, Field(ge=1)] = 1000
    """Rounds of one run."""
    max_steps: Annotated[int, Field(ge=1)] = 10_000
    """Optimizer steps of one round."""
    max_tokens: Annotated[int, Field(ge=1)] = 50_000_000
    """Tokens of one round, padding counted."""
    max_flops: Annotated[float, Field(ge=0)] = 0.0
    """FLOPs of one round; 0 for any number."""


class SiteNvflare(Section):
    """How the site takes part over NVIDIA FLARE."""

    kit: str = ""
    """The folder that the hub made for this site, from that of the site's file; `site check` reads it."""


class SiteFlower(Section):
    """How the site takes part over Flower; `site check` reads it."""

    superlink: str = ""
    """The SuperLink's host and port, such as "hub.example:8000"."""
    root_certificates: str = ""
    """PEM file of who signed the SuperLink's certificate, from the folder of the site's file."""


class Site(SettingsFile):
    """The whole file."""

    name: Annotated[str, Field(pattern=f"^{SITE_NAME}$")]
    """The site's name on the engine."""
    data: SiteData
    trainer: SiteTrainer
    limits: SiteLimits = SiteLimits()
    nvflare: SiteNvflare = SiteNvflare()
    flower: SiteFlower = SiteFlower()
    models: dict[str, str] = Field(default_factory=lambda: {EMBEDDED_MODEL: EMBEDDED_MODEL})
    """The base models that may be trained: the hub's name for it, and the folder or hub id here."""

    @field_validator("models")
    @classmethod
    def _not_empty(cls, value: dict[str, str]) -> dict[str, str]:
        if not value:
            raise ValueError('must allow at least one model, such as { "olmoe-tiny" = "olmoe-tiny" }')
        return value

    @property
    def most_experts(self) -> int:
        """Experts per token of the largest plan that is accepted."""
        return max(self.trainer.active_experts, self.trainer.max_active_experts)

    @property
    def socket_path(self) -> Path:
        """Where the trainer listens."""
        return self.folder / self.trainer.socket

    @property
    def state_path(self) -> Path:
        """Where the trainer keeps what must survive it."""
        return self.folder / self.trainer.state_dir

    @property
    def dataset(self) -> str:
        """The data file with its folder, or the hub id."""
        local = self.folder / self.data.dataset_name
        return str(local) if local.exists() or self.data.dataset_name.count(".") else self.data.dataset_name


def load_site(path: Path) -> Site:
    """Read a site's file. Raises UserError as `load_file` does."""
    return load_file(Site, path, "site file")
