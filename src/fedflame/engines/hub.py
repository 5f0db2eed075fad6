"""The hub's file: which sites take part over which engine, and how long the hub waits for them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from fedflame.config import flat, read_toml, refuse_unknown_key, validated
from fedflame.errors import UserError


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class HubRounds(_Section):
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


class NvflareHub(_Section):
    """Where NVIDIA FLARE is reached."""

    admin_kit: str = ""
    """Folder of a provisioned administrator with the right to submit jobs, from the folder of the file."""


class FlowerHub(_Section):
    """Where Flower's SuperLink is reached, and which of its nodes are which sites."""

    address: str = ""
    """Host and port of the SuperLink, such as "hub.example:8000"."""
    root_certificates: str = ""
    """PEM file of who signed the SuperLink's certificate, from the folder of the file; empty for whom the
    system trusts."""
    insecure: bool = False
    """Without TLS, on one machine."""
    nodes: dict[str, int] = {}
    """Site -> the id that `flwr supernode register` gave its key; empty where the SuperLink does not
    authenticate nodes: they say themselves who they are then."""


class Hub(_Section):
    """The whole file."""

    sites: str
    """Names of the sites, comma-separated: the first is client 0 of the run, and so on."""
    rounds: HubRounds = HubRounds()
    nvflare: NvflareHub = NvflareHub()
    flower: FlowerHub = FlowerHub()
    folder: Path = Path()
    """Where the file is."""

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
    """Read a hub's file. Raises UserError as `load_site` does."""
    values = read_toml(path, "hub file")
    valid = hub_keys()
    for key in flat(_without_nodes(values)):
        refuse_unknown_key(key, valid, f"hub file {path}")
    if "sites" not in values:
        raise UserError(f"hub file {path}: sites is missing")
    return validated(Hub, {**values, "folder": path.absolute().parent}, f"hub file {path}")


def hub_keys() -> list[str]:
    """Every key in flat form, such as `rounds.round_timeout`; below `flower.nodes` are names of sites."""
    keys = []
    for name, field in Hub.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += [f"{name}.{key}" for key in field.annotation.model_fields]
        elif name != "folder":
            keys.append(name)
    return keys


def _without_nodes(values: dict[str, Any]) -> dict[str, Any]:
    """What stands below `flower.nodes` are names of sites, not keys of ours."""
    flower = values.get("flower")
    if not isinstance(flower, dict):
        return values
    return {**values, "flower": {name: value for name, value in flower.items() if name != "nodes"}}
