"""The sites of a run as its clients, and what of them the run folder keeps."""

from __future__ import annotations

import secrets
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedflame.base.files import model_digest
from fedflame.checked_json import read_checked, write_checked
from fedflame.config.run_config import RunConfig
from fedflame.config.words import Dtype
from fedflame.engines.clients import EngineClients
from fedflame.engines.jobs import engine_jobs
from fedflame.errors import UserError
from fedflame.experiment.sites import Sites
from fedflame.run_files import ADVICE
from fedflame.trainer.job import TrainingJob


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
    job = _training_job(config, dtype)
    with engine_jobs(sites.engine, say) as jobs, tempfile.TemporaryDirectory(prefix="fedflame-") as folder:
        clients = EngineClients(
            engine=sites.engine,
            engine_jobs=jobs,
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


def _training_job(config: RunConfig, dtype: Dtype) -> TrainingJob:
    return TrainingJob(
        model_name_or_path=config.model.model_name_or_path,
        model_digest=model_digest(config.model.model_name_or_path),
        dtype=dtype,
        r=config.adapter.r,
        lora_alpha=config.adapter.lora_alpha,
        target_modules=",".join(config.adapter.target_modules),
        max_length=config.data.max_length,
        num_server_rounds=config.server.num_server_rounds,
    )


def _run_id(run: Path) -> str:
    """What trainers know the run by, the same after every resumption."""
    path = run / "run-id.json"
    if not path.exists():
        write_checked(path, {"run": secrets.token_hex(16)})
    return str(read_checked(path, ADVICE)["run"])


def _check_descriptions(
    found: Mapping[str, Mapping[str, Any]],
    config: RunConfig,
    names: Sequence[str],
    num_experts_per_tok: int,
    say: Callable[[str], None],
) -> None:
    rounds = range(1, config.server.num_server_rounds + 1)
    by_round = [config.trained_experts(num_experts_per_tok, number) for number in rounds]
    for client, (name, k) in enumerate(zip(names, config.afforded_experts(), strict=True)):
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
    partition = read_checked(path, ADVICE)
    for entry, name, rows in zip(partition["clients"], clients.sites, clients.num_examples(), strict=True):
        entry |= {"site": name, "rows": rows, "per_category": {"all": rows}}
    partition |= {
        "rows": sum(clients.num_examples()),
        "categories": ["all"],
        "partition": "sites",
        "alpha": None,
    }
    write_checked(path, partition)
