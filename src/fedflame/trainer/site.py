"""The site's file: its data, its machine, and what it allows a run to do. It never leaves the site."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, field_validator, model_validator

from fedflame.config.privacy_section import DELTA
from fedflame.config.sections import EMBEDDED_MODEL
from fedflame.config.settings import Section, SettingsFile, load_file
from fedflame.config.values import Device, PublicKeys
from fedflame.config.words import Checkpointed, Disclosure
from fedflame.data.templates import PLAIN
from fedflame.errors import UserError

TRAINER_LOCK = "trainer.lock"
"""The file of the state folder by which one trainer serves the site; see `folder_lock`."""
SITE_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"


class SiteData(Section):
    """The rows to train on, and those to score."""

    dataset_name: str
    """A .jsonl, .json, .jsonl.gz, .parquet or .csv file, relative to the folder of this file, or a hub id."""
    split: str = "train"
    """Split of a hub data set."""
    dataset_config_name: str = ""
    """Configuration of a hub data set that has several."""
    test_dataset_name: str = ""
    """Rows that the hub may have scored here, as `dataset_name` names those to train on. Sums leave the site,
    no row does. Empty, with `test_size` 0: this site scores nothing."""
    test_split: str = "test"
    """Split of a hub data set named by `test_dataset_name`."""
    test_size: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """About this share of the rows of `dataset_name`, and at least one of them, is scored instead of trained
    on. Which ones follows from what they say, so that a row keeps its side when others are added."""
    messages_field: str = ""
    """Column of whole conversations. Empty: `messages` and `conversations` are recognised."""
    instruction_field: str = ""
    """Column of the instruction. Empty: the names of Alpaca, Dolly, question/answer and prompt/completion are
    recognised."""
    context_field: str = ""
    """Column of the context or input."""
    response_field: str = ""
    """Column of the response."""
    person_field: str = ""
    """Column that names the person whom a row is about. In a private run all rows of a person are then
    protected together. Empty: each row is protected by itself."""
    chat_template_path: str = ""
    """The chat template that rows are rendered by: a jinja file or a tokenizer's folder, relative to the
    folder of this file. Empty: the model's own, or the plain form if it has none. `plain`: the plain form. It
    must be the hub's."""

    @model_validator(mode="after")
    def _one_source_of_tests(self) -> Self:
        if self.test_dataset_name and self.test_size:
            raise ValueError("test_dataset_name and test_size exclude each other; leave one out")
        return self


class SiteTrainer(Section):
    """What the site's machine affords, and where the trainer keeps its files."""

    active_experts: Annotated[int, Field(ge=1)]
    """Experts per token that the machine affords (k_i)."""
    max_active_experts: Annotated[int, Field(ge=0)] = 0
    """Largest k that a plan may ask for; a larger one is refused. With `strategy.k_rotation = "all"` plans
    ask for a k above `active_experts` in some rounds, with fewer steps. 0: `active_experts`."""
    device: Device = "auto"
    """The device that trains. `auto`: a CUDA card if there is one, otherwise the CPU. `cuda`: the first card.
    A card such as `cuda:1`: that card. No plan can ask for another one."""
    socket: str = "trainer.sock"
    """The trainer's socket, relative to the folder of this file; a path of at most about 100 letters."""
    state_dir: str = "state"
    """Folder for state that must survive a crash: the last answers and their rounding errors."""
    kept_runs: Annotated[int, Field(ge=1)] = 10
    """Number of runs whose state is kept. When another run begins, the state of the oldest is removed."""
    gradient_checkpointing: Checkpointed = "none"
    """Recompute values in the backward pass to save memory; the result is the same."""


class SiteLimits(Section):
    """What a plan may ask for, and what leaves the site. A plan that asks for more is refused.

    Runs and rounds are counted in the ledger of the trainer's state folder.
    """

    max_rounds: Annotated[int, Field(ge=1)] = 1000
    """Largest number of rounds of a run."""
    max_steps: Annotated[int, Field(ge=1)] = 10_000
    """Largest number of optimizer steps in a round."""
    max_tokens: Annotated[int, Field(ge=1)] = 50_000_000
    """Largest number of tokens in a round, with padding."""
    max_flops: Annotated[float, Field(ge=0)] = 0.0
    """Largest number of FLOPs in a round; 0 means no limit."""
    max_rank: Annotated[int, Field(ge=1)] = 256
    """Largest LoRA rank."""
    max_memory: Annotated[float, Field(ge=0)] = 0.0
    """Largest memory of a round, in GB, as estimated before it: model, adapter, moments and activations. 0:
    on a CPU, the memory of the machine or of its container; on a card, no limit."""
    max_seconds_per_round: Annotated[float, Field(ge=0)] = 0.0
    """Largest number of seconds in a round. It is looked at after every optimizer step; 0 means no limit."""
    max_rounds_per_day: Annotated[int, Field(ge=0)] = 0
    """Largest number of rounds, of all runs, within 24 hours, and also of evaluations; 0 means no limit."""
    max_runs: Annotated[int, Field(ge=0)] = 0
    """Largest number of runs that the site ever takes part in; 0 means no limit."""
    min_rows_per_update: Annotated[int, Field(ge=1)] = 1
    """Smallest number of different rows behind an update, and of rows behind a score. Fewer rows show more of
    each."""
    min_tokens_per_update: Annotated[int, Field(ge=1)] = 1
    """Smallest number of tokens behind an update, and of response tokens behind a score."""
    max_update_norm: Annotated[float, Field(ge=0)] = 0.0
    """Largest L2 norm of an update, over all values of the adapter and the rescalers. The trainer scales a
    larger one down, whatever the plan says; 0 means no limit."""
    disclosure: Disclosure = "exact"
    """What the hub learns of the mean loss, of scores and of the activation counts. `rounded`: one decimal of
    loss and scores, and rough counts. `withheld`: no loss, counts that say only which experts were used, and
    nothing is scored for the hub."""


class SitePrivacy(Section):
    """What the rows of the site may tell, over all runs; see docs/privacy.md.

    What was spent stands in the ledger of the trainer's state folder, by the name of the data set.
    """

    require: bool = False
    """Whether only private plans are carried out (`privacy.unit = "row"` at the hub), and nothing is scored
    for the hub. With `max_epsilon` it is so anyway."""
    max_epsilon: Annotated[float, Field(ge=0)] = 0.0
    """The most that all private rounds on this data set may spend together. A run that would go beyond it is
    refused before its first round, and so is one without noise; 0 means no limit."""
    delta: Annotated[float, Field(gt=0, lt=1)] = DELTA
    """The delta for which `max_epsilon` is computed, below one over the rows."""
    min_peers: Annotated[int, Field(ge=2)] = 2
    """The fewest other sites in a masked sum: with one, that one knows this site's update. Needs
    `[peers]`."""

    @property
    def only_private(self) -> bool:
        """Whether plans without noise are refused. They spend more than any `max_epsilon`."""
        return self.require or self.max_epsilon > 0


class SiteNvflare(Section):
    """How the site takes part over NVIDIA FLARE."""

    kit: str = ""
    """The startup kit from the hub, relative to the folder of this file; `site check` reads it."""


class SiteFlower(Section):
    """How the site takes part over Flower; `site check` reads it."""

    superlink: str = ""
    """The SuperLink's host and port, such as "hub.example:8000"."""
    root_certificates: str = ""
    """PEM file of the authority that signed the SuperLink's certificate, relative to this file's folder."""


class Site(SettingsFile):
    """The content of the site's file."""

    name: Annotated[str, Field(pattern=f"^{SITE_NAME}$")]
    """The site's name on the engine."""
    data: SiteData
    trainer: SiteTrainer
    limits: SiteLimits = SiteLimits()
    privacy: SitePrivacy = SitePrivacy()
    nvflare: SiteNvflare = SiteNvflare()
    flower: SiteFlower = SiteFlower()
    peers: PublicKeys = Field(default_factory=dict)
    """The sites whose updates may be summed with this one's: name -> the key that `site check` shows there,
    which must come from the site itself and not through the hub. With any, the hub sees updates in sums only
    (`privacy.secure_aggregation`), and a plan without is refused."""
    models: dict[str, str] = Field(default_factory=lambda: {EMBEDDED_MODEL: EMBEDDED_MODEL})
    """The base models that may be trained: the hub's name -> the folder or hub id at this site."""

    @field_validator("models")
    @classmethod
    def _not_empty(cls, value: dict[str, str]) -> dict[str, str]:
        if not value:
            raise ValueError('must allow at least one model, such as { "olmoe-tiny" = "olmoe-tiny" }')
        return value

    @property
    def columns(self) -> dict[str, str]:
        """The arguments of `load_rows` beside the place of the rows."""
        beside = {"dataset_name", "chat_template_path", "test_dataset_name", "test_split", "test_size"}
        return self.data.model_dump(exclude=beside)

    @property
    def chat_template_path(self) -> str:
        """The path of the chat template, or `plain`; empty for the model's own."""
        given = self.data.chat_template_path
        return given if given in ("", PLAIN) else str(self.folder / given)

    @property
    def most_experts(self) -> int:
        """The largest k that a plan may ask for."""
        return max(self.trainer.active_experts, self.trainer.max_active_experts)

    @property
    def socket_path(self) -> Path:
        """The path of the trainer's socket."""
        return self.folder / self.trainer.socket

    @property
    def state_path(self) -> Path:
        """The folder of the state that must survive a crash."""
        return self.folder / self.trainer.state_dir

    @property
    def dataset(self) -> str:
        """The path of the data file, or the hub id."""
        return self._place(self.data.dataset_name)

    @property
    def test_dataset(self) -> str:
        """The path of the file with the rows to score, or the hub id; empty if there is none."""
        return self._place(self.data.test_dataset_name) if self.data.test_dataset_name else ""

    def _place(self, name: str) -> str:
        local = self.folder / name
        return str(local) if local.exists() or name.count(".") else name


def load_site(path: Path) -> Site:
    """Read a site's file. Raises UserError as `load_file` does, or if it asks for peers and names none."""
    site = load_file(Site, path, "site file")
    if not site.peers and "min_peers" in site.privacy.model_fields_set:
        raise UserError(
            f"site file {path}: privacy.min_peers is set without [peers], so that no update is hidden; name "
            "the peers, or leave it out"
        )
    return site
