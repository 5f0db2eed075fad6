"""The sites of a run as its clients, and what of them the run folder keeps."""

from __future__ import annotations

import secrets
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from fedflame.base.files import model_digest
from fedflame.checked_json import read_checked, write_checked
from fedflame.config.methods import METHODS
from fedflame.config.run_config import RunConfig
from fedflame.config.strategy_section import StrategyConfig
from fedflame.engines.answers import Description
from fedflame.engines.clients import EngineClients
from fedflame.engines.jobs import engine_jobs
from fedflame.errors import UserError
from fedflame.experiment.assemble import Experiment
from fedflame.experiment.sites import Sites
from fedflame.run_files import ADVICE
from fedflame.server.validation import MOST_TIMES_MEDIAN, most_rows
from fedflame.trainer.job import TrainingJob


@contextmanager
def site_clients(
    sites: Sites,
    experiment: Experiment,
    run: Path,
    say: Callable[[str], None],
) -> Iterator[EngineClients]:
    """The sites as clients of the run, once they have said what they have.

    Raises:
        UserError: no job of the engine works, or too few sites can take part.
    """
    hub, config = sites.hub, experiment.config
    job = _training_job(experiment)
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
        _leave_out_who_affords_less(
            clients, clients.describe(), config, experiment.adapted.num_experts_per_tok
        )
        _require_enough(clients, config.server.min_clients)
        if config.evaluating_clients():
            _say_who_scores_no_rows(clients)
        if config.strategy.counted_rows == "held":
            _say_whose_rows_are_too_many(clients)
        _record(run, clients)
        yield clients


def _training_job(experiment: Experiment) -> TrainingJob:
    config, encoder = experiment.config, experiment.encoder
    return TrainingJob(
        model_name_or_path=config.model.model_name_or_path,
        model_digest=model_digest(config.model.model_name_or_path),
        dtype=experiment.adapted.dtype,
        r=config.adapter.r,
        lora_alpha=config.adapter.lora_alpha,
        use_rslora=config.adapter.use_rslora,
        target_modules=",".join(config.adapter.target_modules),
        max_length=encoder.max_length,
        template_digest=encoder.template.digest,
        assistant_only_loss=encoder.assistant_only_loss,
        completion_only_loss=encoder.completion_only_loss,
        train_on_eos=encoder.train_on_eos,
        num_server_rounds=config.server.num_server_rounds,
    )


def _run_id(run: Path) -> str:
    """What trainers know the run by, the same after every resumption."""
    path = run / "run-id.json"
    if not path.exists():
        write_checked(path, {"run": secrets.token_hex(16)})
    return str(read_checked(path, ADVICE)["run"])


def _leave_out_who_affords_less(
    clients: EngineClients,
    found: Mapping[str, Description],
    config: RunConfig,
    num_experts_per_tok: int,
) -> None:
    """Leave out the sites that cannot run what the run gives them in any round, and say which these are."""
    rounds = range(1, config.server.num_server_rounds + 1)
    by_round = [config.trained_experts(num_experts_per_tok, number) for number in rounds]
    for client, (name, k) in enumerate(zip(clients.sites, config.afforded_experts(), strict=True)):
        if name not in found:
            continue
        affords, most = found[name].active_experts, found[name].max_active_experts
        trained = [in_turn[client] for in_turn in by_round]
        clients.say(f"{name}: {found[name].num_examples} rows, affords k = {affords}")
        if affords < k:
            clients.leave_out(
                name,
                f"clients.active_experts gives it k = {k}, its trainer affords {affords}; "
                "give it less, or let its owner allow more",
            )
        elif most < min(trained):
            clients.leave_out(name, _too_many_experts(config.strategy, trained[0], most))
        elif most < max(trained):
            clients.say(
                f"{name} refuses the rounds in which it would train with more than k = {most}; ask for less "
                "(strategy.k_rotation = 'smaller'), or let its owner allow more "
                f"(trainer.max_active_experts = {max(trained)})"
            )


def _too_many_experts(strategy: StrategyConfig, k: int, most: int) -> str:
    """Return why a site can train in no round of a method that gives every client the same k."""
    given = f"strategy.active_experts = {strategy.active_experts!r}"
    advice = "choose fewer"
    if METHODS[strategy.name].experts == "full":
        given = f"strategy.name = {strategy.name!r}"
        advice = "choose a method that needs fewer, such as 'flame'"
    return (
        f"{given} has every client train with k = {k}, its trainer allows at most {most}; {advice}, "
        f"or let its owner allow more (trainer.max_active_experts = {k})"
    )


def _require_enough(clients: EngineClients, min_clients: int) -> None:
    """Raise UserError where so many sites are left out that no round could count; absent ones may come."""
    left = len(clients.sites) - len(clients.left_out)
    if left < min_clients:
        site, reason = next(iter(clients.left_out.items()))
        raise UserError(
            f"{left} of {len(clients.sites)} sites can take part; server.min_clients = {min_clients} are "
            f"needed. {site} cannot: {reason}"
        )


def _say_whose_rows_are_too_many(clients: EngineClients) -> None:
    most = most_rows(clients.num_examples())
    for name, rows in zip(clients.sites, clients.num_examples(), strict=True):
        if rows > most:
            clients.say(
                f"{name} claims {rows:,} rows; it weighs as {most:,}, {MOST_TIMES_MEDIAN} times the median "
                "(strategy.counted_rows = 'held')"
            )


def _say_who_scores_no_rows(clients: EngineClients) -> None:
    for name, rows in zip(clients.sites, clients.test_rows(), strict=True):
        if rows == 0 and name not in clients.left_out:
            clients.say(
                f"{name} is not asked to score: its file holds out no rows for it (data.test_size) or fewer "
                "than limits.min_rows_per_update, or withholds what they tell (limits.disclosure)"
            )


def _record(run: Path, clients: EngineClients) -> None:
    """Into partition.json, which knows the rows of the hub's own file until then."""
    path = run / "partition.json"
    partition = read_checked(path, ADVICE)
    told = zip(clients.sites, clients.num_examples(), clients.test_rows(), strict=True)
    for entry, (name, rows, tests) in zip(partition["clients"], told, strict=True):
        entry |= {"site": name, "rows": rows, "per_category": {"all": rows}}
        if "test_rows" in entry:
            entry["test_rows"] = tests
    partition |= {
        "rows": sum(clients.num_examples()),
        "categories": ["all"],
        "partition": "sites",
        "alpha": None,
    }
    write_checked(path, partition)
