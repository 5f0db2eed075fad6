"""Who takes part in a run over sites: the hub's file, and the engine that reaches them. No torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from fedflame.engines.engine import Engine
from fedflame.engines.hub import Hub
from fedflame.errors import UserError

EngineName = Literal["nvflare", "flower"]


@dataclass(frozen=True)
class Sites:
    """The hub's file, and the engine that reaches its sites."""

    hub: Hub
    engine: Engine


def open_sites(name: EngineName, hub: Hub) -> Sites:
    """The sites over this engine. Raises UserError where it is not installed or not set up."""
    from fedflame.engines.flower.engine import FlowerEngine
    from fedflame.engines.nvflare.engine import NvflareEngine

    engines: dict[EngineName, Callable[[Hub], Engine]] = {"nvflare": NvflareEngine, "flower": FlowerEngine}
    return Sites(hub, engines[name](hub))


def check_sites(num_clients: int, sites: Sites) -> None:
    """Raises UserError where the run has not one client per site."""
    names = sites.hub.site_names()
    if len(names) != num_clients:
        raise UserError(
            f"clients.num_clients = {num_clients}: the hub's file has {len(names)} sites "
            f"({', '.join(names)}); each is one client"
        )
