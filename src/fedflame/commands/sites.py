"""A run whose clients are sites behind an engine: who takes part, and what of it the run folder keeps."""

from __future__ import annotations

import json
import secrets
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fedflame.atomic_file import write_atomically
from fedflame.base_model import model_digest
from fedflame.choices import Dtype
from fedflame.config import RunConfig
from fedflame.engines.clients import EngineClients
from fedflame.engines.engine import Engine
from fedflame.engines.hub import Hub
from fedflame.engines.segment import segments
from fedflame.errors import UserError
from fedflame.trainer.job import TrainingJob

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


def check_sites(config: RunConfig, sites: Sites) -> None:
    """Raises UserError where the run has not one client per site."""
    names = sites.hub.site_names()
    if len(names) != config.clients.num_clients:
        raise UserError(
            f"clients.num_clients = {config.clients.num_clients}: the hub's file has {len(names)} sites "
            f"({', '.join(names)}); each is one client"
        )


@contextmanager
def site_clients(
    sites: Sites,
    config: RunConfig,
    dtype: Dtype,
    num_experts_per_tok: int,
    run: Path,
    say: Callable[[str], None],
) -> Iterator[EngineClients]:
    """The sites as clients of the run, once they have said what they have.

    Raises:
        UserError: no job of the engine works, or a site allows fewer experts than the run gives it.
    """
    hub = sites.hub
    job = TrainingJob.of_run(config, dtype, model_digest(config.model.model_name_or_path))
    with segments(sites.engine, say) as jobs, tempfile.TemporaryDirectory(prefix="fedflame-") as folder:
        clients = EngineClients(
            engine=sites.engine,
            segments=jobs,
            run=_run_id(run),
            job=job.model_dump(),
            sites=hub.site_names(),
            rounds=hub.rounds,
            quorum=config.server.min_clients,
            folder=Path(folder),
            say=say,
        )
        _check_descriptions(clients.describe(), config, clients.sites, num_experts_per_tok, say)
        _record(run, clients)
        yield clients


def _run_id(run: Path) -> str:
    """What trainers know the run by, the same after every resumption."""
    path = run / "run-id"
    if not path.exists():
        write_atomically(path, secrets.token_hex(16).encode())
    return path.read_text()


def _check_descriptions(
    found: Mapping[str, Mapping[str, Any]],
    config: RunConfig,
    names: Sequence[str],
    num_experts_per_tok: int,
    say: Callable[[str], None],
) -> None:
    rounds = range(1, config.server.num_server_rounds + 1)
    by_round = [config.trained_experts(num_experts_per_tok, number) for number in rounds]
    for client, (name, k) in enumerate(zip(names, config.tiers(), strict=True)):
        description = found.get(name)
        if description is None:
            continue
        affords, most = description.get("active_experts"), description.get("max_active_experts")
        say(f"{name}: {description.get('num_examples')} rows, affords k = {affords}")
        if not isinstance(affords, int) or affords < k:
            raise UserError(
                f"clients.active_experts gives {name} k = {k}: its trainer affords {affords}; "
                "give it less, or let its owner allow more"
            )
        largest = max(in_turn[client] for in_turn in by_round)
        if not isinstance(most, int) or most < largest:
            raise UserError(
                f"{name} would train with k = {largest} in some rounds; its trainer allows {most}: ask for "
                "less (strategy.k_rotation = 'smaller'), or let its owner allow more "
                "(trainer.max_active_experts)"
            )


def _record(run: Path, clients: EngineClients) -> None:
    """Into partition.json, which knows the rows of the hub's own file until then."""
    path = run / "partition.json"
    partition = json.loads(path.read_text())
    for entry, name, rows in zip(partition["clients"], clients.sites, clients.num_examples(), strict=True):
        entry |= {"site": name, "rows": rows, "per_category": {"all": rows}}
    partition |= {
        "rows": sum(clients.num_examples()),
        "categories": ["all"],
        "partition": "sites",
        "alpha": None,
    }
    write_atomically(path, (json.dumps(partition, indent=1) + "\n").encode())
