"""The hub's file: the sites, how to reach them through an engine, and how long to wait for them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator, field_validator

from fedflame.config.lists import Names
from fedflame.config.settings import Section, SettingsFile, load_file
from fedflame.config.values import PublicKeys


def _learned_or_seconds(value: Any) -> float | Literal["learned"]:
    if value == "learned":
        return "learned"
    if type(value) not in (int, float) or not 0 <= value < math.inf:
        raise ValueError("must be 'learned' or a number of seconds of at least 0")
    return float(value)


LearnedOrSeconds = Annotated[float | Literal["learned"], PlainValidator(_learned_or_seconds)]


class HubRounds(Section):
    """How long the hub waits. The run's `server.min_clients` says how many updates a round needs."""

    round_timeout: Annotated[float, Field(gt=0)] = 3600.0
    """Seconds that a round may take. A site that has not answered by then is left out of the round."""
    straggler_grace: LearnedOrSeconds = "learned"
    """How long the others are waited for once `server.min_clients` updates have arrived. `learned`: three
    times as long as their own answers took before, for as much work, and at least 10 minutes; a site that
    has never answered, until `round_timeout` once, and then by what the others take. A number: so many
    seconds from then on. 0: until `round_timeout`, whatever they took before."""
    rejoin_timeout: Annotated[float, Field(ge=0)] = 120.0
    """Seconds to wait for a site that has gone. After that, rounds go on without it until it is back."""
    start_timeout: Annotated[float, Field(gt=0)] = 120.0
    """Seconds from the submission of a job to its first message."""
    max_resubmissions: Annotated[int, Field(ge=0)] = 5
    """Jobs that may fail in a row, without an answer between them, before the run ends."""


class NvflareHub(Section):
    """How to reach NVIDIA FLARE."""

    admin_kit: str = ""
    """Startup kit of an administrator who may submit jobs; a folder, relative to the folder of this file."""


class FlowerHub(Section):
    """How to reach Flower's SuperLink, and which node belongs to which site."""

    address: str = ""
    """Host and port of the SuperLink, such as "hub.example:8000"."""
    root_certificates: str = ""
    """PEM file of the authority that signed the SuperLink's certificate, relative to the folder of this file.
    Empty: the authorities that the system trusts."""
    insecure: bool = False
    """Connect without TLS; only on one machine."""
    nodes: dict[str, int] = Field(default_factory=dict)
    """Site -> node id, as `flwr supernode register` printed it for the site's key. Empty if the SuperLink
    does not authenticate nodes; the nodes then give their own names."""


class Hub(SettingsFile):
    """The content of the hub's file."""

    sites: Names
    """Names of the sites. The first is client 0 of the run, the next client 1, and so on."""
    rounds: HubRounds = HubRounds()
    nvflare: NvflareHub = NvflareHub()
    flower: FlowerHub = FlowerHub()
    peers: PublicKeys = Field(default_factory=dict)
    """The key of every site, as its file's `[peers]` names it to the others: `hub check` shows their
    fingerprints. A run needs none of them."""

    @field_validator("sites")
    @classmethod
    def _different_names(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if not names or not all(names) or len(set(names)) < len(names):
            raise ValueError('must be different names, such as ["site-1", "site-2"]')
        return names

    def site_names(self) -> list[str]:
        """Return the names of the sites in client order."""
        return list(self.sites)


def load_hub(path: Path) -> Hub:
    """Read a hub's file. Raises UserError as `load_file` does."""
    return load_file(Hub, path, "hub file")
