"""The files of a run folder: what is written before the first round, and what a resumption reads of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fedflame.atomic_file import write_atomically, write_json
from fedflame.base.device import DeviceChoice, device_facts
from fedflame.base.dtype import DtypeChoice
from fedflame.config.run_config import SCHEMA_VERSION, WITHOUT, RunConfig
from fedflame.config.settings import flat, validated
from fedflame.errors import UserError

if TYPE_CHECKING:
    from fedflame.experiment.assemble import Experiment

Existing = Literal["refuse", "resume", "overwrite"]
MAY_CHANGE = {"output_dir", "model.device", "training.gradient_checkpointing"}
"""The settings that a resumption may change: where and how a run computes, not what."""


def check_run_folder(run: Path, config: RunConfig, existing: Existing) -> None:
    """Raises UserError for a folder that must not be touched, and for a resumption with other settings."""
    if existing == "resume":
        before, now = flat(saved_config(run).model_dump()), flat(config.model_dump())
        if differing := [key for key in now if key not in MAY_CHANGE and before[key] != now[key]]:
            raise UserError(
                f"{run}: --resume needs the configuration it was started with; {differing[0]} differs "
                f"(config.json in the run folder has it)"
            )
    elif run.exists() and not (run.is_dir() and not any(run.iterdir())):
        if existing == "refuse":
            raise UserError(f"{run}: exists already; --resume goes on with it, --overwrite starts anew")
        if not is_old_run(run):
            saved_config(run)


def is_run(folder: Path) -> bool:
    """Whether a folder holds a run that has begun."""
    return (folder / "metrics.jsonl").is_file()


def is_old_run(run: Path) -> bool:
    """Whether it is a run folder of another version, which may be replaced but not gone on with."""
    values = _run_settings(run)
    return values is not None and not _has_version(values)


def saved_config(run: Path) -> RunConfig:
    """The configuration in a run folder.

    Raises:
        UserError: the folder is no run folder, which nothing may remove, or is one of another version.
    """
    values = _run_settings(run)
    if values is None:
        raise UserError(f"{run}: not a run folder (no config.json of a run); it is left as it is")
    if not _has_version(values):
        raise UserError(
            f"{run}: its settings have schema version {values.get('schema_version')!r}; this fedflame reads "
            f"version {SCHEMA_VERSION}. Use the fedflame that made it, or start a new run"
        )
    del values["schema_version"]
    for key, value in WITHOUT.items():
        section, _, name = key.partition(".")
        values[section].setdefault(name, value)
    return validated(RunConfig, values, f"{run / 'config.json'}, which is left as it is")


def _run_settings(run: Path) -> dict[str, Any] | None:
    """What config.json holds; None where there is none, or one of something else than a run."""
    try:
        values = json.loads((run / "config.json").read_bytes())
    except (OSError, ValueError):
        return None
    is_of_run = isinstance(values, dict) and values.keys() >= {"strategy", "server", "output_dir"}
    return values if is_of_run else None


def _has_version(values: dict[str, Any]) -> bool:
    version = values.get("schema_version")
    return type(version) is int and version == SCHEMA_VERSION


def saved_dtype(run: Path) -> DtypeChoice | None:
    """The base's dtype in a run folder: a new probe of the machine must not change the numbers."""
    path = run / "environment.json"
    if not path.exists():
        return None
    return DtypeChoice(json.loads(path.read_text())["dtype"], "as before")


def device_change(run: Path, device: DeviceChoice) -> str:
    """What to say where a run goes on with another device than it began with; empty if it is the same."""
    path = run / "environment.json"
    if not path.exists():
        return ""
    before, now = json.loads(path.read_text()).get("gpu"), device_facts(device).get("gpu")
    if before == now:
        return ""
    return (
        f"the run began on {before or 'a CPU'} and goes on with {now or 'a CPU'}, which rounds otherwise: it "
        "ends in other bytes than a run on one of them"
    )


def require_same_data(run: Path, experiment: Experiment, at_sites: bool) -> None:
    """Raises UserError where the data now gives another partition than the one the run began with."""
    saved, now = json.loads((run / "partition.json").read_text()), _partition(experiment)
    # What sites hold is their own; of the hub's data only the held-out rows count.
    compared = ("data_digest", "held_out_rows") if at_sites else now.keys()
    if any(saved.get(key) != now[key] for key in compared):
        raise UserError(
            f"{run}: --resume needs the data it was started with; {experiment.config.data.dataset_name} now "
            "gives another partition (partition.json in the run folder has it)"
        )


def write_run_files(run: Path, experiment: Experiment, config_text: str, environment: dict[str, Any]) -> None:
    """What is known before the first round; config.json first, since it makes the folder a run folder."""
    write_json(run / "config.json", {"schema_version": SCHEMA_VERSION} | experiment.config.model_dump())
    write_atomically(run / "config.toml", config_text.encode())
    facts = environment | device_facts(experiment.device) | {"dtype": experiment.adapted.dtype}
    write_json(run / "environment.json", facts)
    write_json(run / "partition.json", _partition(experiment))
    write_json(run / "plan.json", experiment.cost.to_json())
    skipped = [{"where": row.where, "reason": row.reason} for row in experiment.federation.skipped]
    write_atomically(run / "skipped.jsonl", "".join(json.dumps(row) + "\n" for row in skipped).encode())


def remove_run(run: Path) -> None:
    """Delete a run folder; renamed first, so that a kill on the way does not leave half of one."""
    aside = run.with_name(run.name + ".removed")
    try:
        if aside.exists():
            shutil.rmtree(aside)
        run.rename(aside)
        shutil.rmtree(aside)
    except OSError as error:
        raise UserError(f"{run}: cannot be replaced: {error.strerror}") from error


def _partition(experiment: Experiment) -> dict[str, Any]:
    data, federation = experiment.config.data, experiment.federation
    return {
        "data_digest": federation.digest,
        "partition": federation.partition,
        "alpha": data.alpha if federation.partition == "dirichlet" else None,
        "rows": len(federation.training),
        "categories": federation.categories,
        "clients": experiment.clients,
        "held_out_rows": len(federation.held_out),
        "truncated_rows": experiment.encoded.truncated,
        "skipped_rows": len(federation.skipped),
    }
