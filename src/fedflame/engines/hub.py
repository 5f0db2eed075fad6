"""The hub's file: which sites take part over which engine, and how long the hub waits for them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, field_validator

from fedflame.config.settings import Section, SettingsFile, load_file


class HubRounds(Section):
    """How long the hub waits; how many updates a round needs is `server.min_clients` of the run."""

    round_timeout: Annotated[float, Field(gt=0)] = 3600.0
    """Seconds that a round may take; a site without an answer by then is left out of it."""
    straggler_grace: Annotated[float, Field(ge=0)] = 0.0
    """Seconds that the others have once `server.min_clients` updates are there; 0 to wait for all until
    `round_timeout`."""
    rejoin_timeout: Annotated[float, Field(ge=0)] = 120.0
    """Seconds that a site that is gone has to come back, the first time; later rounds go on without it until
    it is there again."""
    start_timeout: Annotated[float, Field(gt=0)] = 120.0
    """Seconds from the submission of a job to its first word."""
    max_resubmissions: Annotated[int, Field(ge=0)] = 5
    """Jobs that may fail one after another, without an answer between them, before the run ends."""


class NvflareHub(Section):
    """Where NVIDIA FLARE is reached."""

    admin_kit: str = ""
    """Folder of a provisioned administrator with the right to submit jobs, from the folder of the file."""


class FlowerHub(Section):
    """Where Flower's SuperLink is reached, and which of its nodes are which sites."""

    address: str = ""
    """Host and port of the SuperLink, such as "hub.example:8000"."""
    root_certificates: str = ""
    """PEM file of who signed the SuperLink's certificate, from the folder of the file; empty for whom the
    system trusts."""
    insecure: bool = False
    """Without TLS, on one machine."""
    nodes: dict[str, int] = Field(default_factory=dict)
    """Site -> the id that `flwr supernode register` gave its key; empty where the SuperLink does not
    authenticate nodes: they say themselves who they are then."""


class Hub(SettingsFile):
    """The whole file."""

    sites: str
    """Names of the sites, comma-separated: the first is client 0 of the run, and so on."""
    rounds: HubRounds = HubRounds()
    nvflare: NvflareHub = NvflareHub()
    flower: FlowerHub = FlowerHub()

    @field_validator("sites")
    @classmethod
    def _names(cls, value: str) -> str:
        names = [name.strip() for name in value.split(",")]
        if not all(names) or len(set(names)) < len(names):
            raise ValueError('must be different names, comma-separated, such as "site-1,site-2"')
        return value

    def site_names(self) -> list[str]:
        """In client order."""
        return [name.strip() for name in self.sites.split(",")]


def load_hub(path: Path) -> Hub:
    """Read a hub's file. Raises UserError as `load_file` does."""
    return load_file(Hub, path, "hub file")
