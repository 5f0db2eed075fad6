"""The files of a run folder: what is written before the first round, and what a resumption reads of it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fedflame.atomic_file import write_atomically
from fedflame.base.device import DeviceChoice, device_facts
from fedflame.base.dtype import DtypeChoice
from fedflame.checked_json import CHECKSUM, read_checked, write_checked
from fedflame.config.run_config import BESIDE_RESULTS, SCHEMA_VERSION, WITHOUT, RunConfig
from fedflame.config.settings import flat, validated
from fedflame.data.encoder import PLAIN_FORM, PromptForm, prompt_form
from fedflame.errors import UserError
from fedflame.folder_lock import refuse_if_used, sole_user
from fedflame.json_text import to_text
from fedflame.reading import read_object
from fedflame.run_files import ADVICE, LOCK
from fedflame.run_files.lines import FILE_NAME as METRICS_FILE

if TYPE_CHECKING:
    from fedflame.experiment.assemble import Experiment

Existing = Literal["refuse", "resume", "overwrite"]
MAY_CHANGE = BESIDE_RESULTS | {
    "model.device",
    "training.gradient_checkpointing",
    "server.save_total_limit",
    "server.early_stopping_patience",
    "server.early_stopping_threshold",
}
"""The settings that a resumption may change: where, how and how long a run computes, and what it keeps."""
_REMOVED = ".removed"
_CONFIG = "config.json"
_PROMPT = "prompt.json"


@contextmanager
def writing(run: Path) -> Iterator[None]:
    """Be the only process that writes the run folder, within the block. Raises UserError where another is."""
    with sole_user(run / LOCK, _used(run)):
        yield


def refuse_used(run: Path) -> None:
    """Raises UserError where a process writes the run folder now."""
    refuse_if_used(run / LOCK, _used(run))


def check_run_folder(run: Path, config: RunConfig, existing: Existing) -> None:
    """Raises UserError for a folder that must not be touched, and for a resumption with other settings."""
    if existing == "resume":
        before, now = flat(saved_config(run).model_dump()), flat(config.model_dump())
        if differing := [key for key in now if key not in MAY_CHANGE and before[key] != now[key]]:
            raise UserError(
                f"{run}: --resume needs the configuration it was started with; {differing[0]} differs "
                f"(config.json in the run folder has it)"
            )
    elif run.exists() and not (run.is_dir() and not _content(run)):
        if existing == "refuse":
            raise UserError(f"{run}: exists already; --resume goes on with it, --overwrite starts anew")
        _require_run(run)


def is_run(folder: Path) -> bool:
    """Whether a folder holds a run that has begun."""
    return (folder / METRICS_FILE).exists() or (folder / "checkpoint").is_dir()


def saved_config(run: Path) -> RunConfig:
    """The configuration in a run folder.

    Raises:
        UserError: the folder is no run folder, which nothing may remove; or its config.json is damaged, or of
            another version.
    """
    values = _require_run(run)
    if CHECKSUM not in values:  # a version that wrote none is named by its number
        _require_version(run, values)
    values = read_checked(run / _CONFIG, ADVICE)
    _require_version(run, values)
    del values["schema_version"]
    for key, value in WITHOUT.items():
        section, _, name = key.partition(".")
        values[section].setdefault(name, value)
    return validated(RunConfig, values, f"{run / _CONFIG}, which is left as it is")


def _require_version(run: Path, values: dict[str, Any]) -> None:
    version = values.get("schema_version")
    if type(version) is not int or version != SCHEMA_VERSION:
        raise UserError(
            f"{run}: its settings have schema version {version!r}; this fedflame reads "
            f"version {SCHEMA_VERSION}. Use the fedflame that made it, or start a new run"
        )


def _require_run(run: Path) -> dict[str, Any]:
    """What config.json holds, unchecked. Raises UserError where it is not that of a run."""
    try:
        values = read_object(run / _CONFIG)
    except UserError as error:
        raise UserError(f"{run}: not a run folder ({error}); it is left as it is") from error
    if not values.keys() >= {"strategy", "server", "output_dir"}:
        raise UserError(f"{run}: not a run folder (no config.json of a run); it is left as it is")
    return values


def saved_prompt_form(run: Path) -> PromptForm:
    """How the run's rows became text; the plain form in a run folder from before there was another."""
    if not (run / _PROMPT).exists():
        return PLAIN_FORM
    values = read_checked(run / _PROMPT, ADVICE)
    return PromptForm(**{field.name: str(values.get(field.name, "")) for field in fields(PromptForm)})


def saved_dtype(run: Path) -> DtypeChoice | None:
    """The base's dtype in a run folder: a new probe of the machine must not change the numbers."""
    if not is_run(run):
        return None
    return DtypeChoice(_environment(run)["dtype"], "as before")


def device_change(run: Path, device: DeviceChoice) -> str:
    """What to say where a run goes on with another device than it began with; empty if it is the same."""
    if not is_run(run):
        return ""
    before, now = _environment(run).get("gpu"), device_facts(device).get("gpu")
    if before == now:
        return ""
    return (
        f"the run began on {before or 'a CPU'} and goes on with {now or 'a CPU'}, which rounds otherwise: it "
        "ends in other bytes than a run on one of them"
    )


def require_same_data(run: Path, experiment: Experiment, at_sites: bool) -> None:
    """Raises UserError where the data now gives another partition, or other text, than when the run began."""
    _require_same_form(run, experiment)
    saved, now = read_checked(run / "partition.json", ADVICE), _partition(experiment)
    # What sites hold is their own; of the hub's data only the held-out rows count.
    compared = ("data_digest", "held_out_rows") if at_sites else now.keys() - {"columns", "cut_prompts"}
    if any(saved.get(key) != now[key] for key in compared):
        raise UserError(
            f"{run}: --resume needs the data it was started with; {experiment.config.data.dataset_name} now "
            "gives another partition (partition.json in the run folder has it)"
        )


def _require_same_form(run: Path, experiment: Experiment) -> None:
    """Raises UserError where rows are now rendered in another form than when the run began."""
    saved, now = saved_prompt_form(run), experiment.encoder.template
    if (saved.template, saved.jinja) != (now.kind, now.jinja):
        raise UserError(
            f"{run}: --resume needs the chat template it was started with; rows are now in {now.in_words} "
            "(prompt.json in the run folder has the other)"
        )


def write_run_files(run: Path, experiment: Experiment, config_text: str, environment: dict[str, Any]) -> None:
    """What is known before the first round; config.json first, since it makes the folder a run folder."""
    write_checked(run / _CONFIG, {"schema_version": SCHEMA_VERSION} | experiment.config.model_dump())
    write_atomically(run / "config.toml", config_text.encode())
    facts = environment | device_facts(experiment.device) | {"dtype": experiment.adapted.dtype}
    write_checked(run / "environment.json", facts)
    write_checked(run / "partition.json", _partition(experiment))
    write_checked(run / "plan.json", experiment.cost.to_json())
    write_checked(run / _PROMPT, asdict(prompt_form(experiment.encoder)))
    skipped = [{"where": row.where, "reason": row.reason} for row in experiment.federation.skipped]
    write_atomically(run / "skipped.jsonl", "".join(to_text(row) + "\n" for row in skipped).encode())


def empty_run(run: Path) -> None:
    """Remove the content of a run folder, config.json last: until then the folder may be overwritten again.

    Raises:
        UserError: it cannot be removed.
    """
    aside = run / _REMOVED
    try:
        if aside.exists():
            shutil.rmtree(aside)
        if content := _content(run):
            aside.mkdir()
            for path in sorted(content, key=lambda path: path.name == _CONFIG):
                path.rename(aside / path.name)
            shutil.rmtree(aside)
    except OSError as error:
        raise UserError(f"{run}: cannot be replaced: {error.strerror}") from error


def _content(run: Path) -> list[Path]:
    """What is in a folder, but for a lock and what a killed process was about to remove."""
    return [path for path in run.iterdir() if path.name not in (LOCK, _REMOVED)]


def _used(run: Path) -> str:
    return f"{run}: another process writes this run folder"


def _environment(run: Path) -> dict[str, Any]:
    return read_checked(run / "environment.json", ADVICE)


def _partition(experiment: Experiment) -> dict[str, Any]:
    data, federation = experiment.config.data, experiment.federation
    partition: dict[str, Any] = {
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
    said = {"columns": list(federation.columns), "cut_prompts": experiment.encoded.cut_prompts}
    return partition | {key: value for key, value in said.items() if value}
