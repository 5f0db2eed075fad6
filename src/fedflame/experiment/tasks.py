"""Score a run, an adapter or a base model in tasks of lm-evaluation-harness, at one k after another.

The harness gets the live model with adapter and rescaler of the tier in place. Only this module knows it.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedflame.base.files import first_line
from fedflame.config.run_config import RunConfig
from fedflame.cost.model_shape import ModelShape
from fedflame.cost.tiers import require_possible
from fedflame.errors import UserError, one_line
from fedflame.experiment.placement import place
from fedflame.experiment.prepare import require_runnable
from fedflame.experiment.run_folder import is_run, refuse_used, saved_dtype, saved_prompt_form, writing
from fedflame.experiment.source import is_adapter, source_config, source_states
from fedflame.report import write_report
from fedflame.report.numbers import plural
from fedflame.run_files.checkpoints import kept_round
from fedflame.run_files.task_scores import Metric, ScoresAtK, TaskScores, write_task_scores

if TYPE_CHECKING:
    from fedflame.moe.adapted_model import AdaptedModel


@dataclass(frozen=True)
class TaskOptions:
    """What to ask the harness for. The names are its own."""

    tasks: Sequence[str]
    """Tasks, groups and tags."""
    include_path: Path | None = None
    """A folder with task files of one's own."""
    num_fewshot: int | None = None
    limit: float | None = None
    """Rows per task, or below 1 their share."""
    apply_chat_template: bool = False
    batch_size: int = 8


def evaluate_tasks(
    source: str, options: TaskOptions, active_experts: Sequence[int] = (), overrides: Sequence[str] = ()
) -> TaskScores:
    """Scores, speed and memory at each k.

    Args:
        source: a run folder, an adapter folder, or a base model by folder or name.
        options: what to ask the harness for.
        active_experts: the k to evaluate at; empty for those of the source.
        overrides: `section.key=value` over the run's own configuration, or over the defaults.

    Raises:
        UserError: the harness is not installed, does not know a task or cannot load its data; a k that is no
            tier of the source; a memory that is full; or a process that writes the run folder now.
    """
    folder = Path(source)
    if is_run(folder):
        refuse_used(folder)
    config, rank = source_config(source, list(active_experts), list(overrides))
    shape = require_runnable(config, rank)
    require_possible(active_experts, shape)
    tiers = _tiers(folder, config, shape)
    if unknown := [k for k in active_experts if tiers and k not in tiers]:
        raise UserError(
            f"--active-experts {unknown[0]}: {source} has an adapter for k = {', '.join(map(str, tiers))}"
        )
    loaded = _load_tasks(options)
    wanted = active_experts or config.evaluated_experts(shape.num_experts_per_tok)
    return _scores(folder, config, shape, options, loaded, wanted)


def keep_task_scores(run: Path, scores: TaskScores) -> None:
    """Write the scores into a run folder and its report. Raises UserError where that cannot be."""
    with writing(run):
        write_task_scores(run, scores)
        write_report(run)


def _tiers(folder: Path, config: RunConfig, shape: ModelShape) -> list[int]:
    """The k that a source has values for; empty where it serves every k alike."""
    if is_run(folder):
        return config.evaluated_experts(shape.num_experts_per_tok)
    if is_adapter(folder):
        from fedflame.exports import rescaler_tiers

        return rescaler_tiers(folder)
    return []


def _load_tasks(options: TaskOptions) -> dict[str, Any]:
    """The harness' tasks with their data, before any weight is loaded."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError("--tasks needs lm-evaluation-harness: pip install 'fedflame[eval]'") from error
    import logging

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if options.limit is not None and not 0 < options.limit < math.inf:
        raise UserError(f"--limit {options.limit:g}: must be rows, or a share of them between 0 and 1")
    path = options.include_path
    if path is not None and not path.is_dir():
        raise UserError(f"--include-path {path}: no such folder")
    with _harness_in_words("the tasks cannot be read"):
        manager = TaskManager(include_path=path)
    known = {*manager.all_tasks}
    if unknown := [name for name in options.tasks if name not in known]:
        raise UserError(
            f"--tasks {unknown[0]}: no such task, group or tag; `lm-eval ls tasks` lists the harness' own, "
            "and --include-path adds a folder with task files of your own"
        )
    with _harness_in_words(f"--tasks {','.join(options.tasks)}: cannot be loaded"):
        loaded: dict[str, Any] = manager.load(list(options.tasks))
    for task in loaded["tasks"].values():
        own = task.get_config("num_fewshot")
        if own is None or (options.num_fewshot is not None and own != 0):  # a task with 0 never gets any
            task.set_config(key="num_fewshot", value=options.num_fewshot or 0)
    return loaded


@contextmanager
def _harness_in_words(doing: str) -> Iterator[None]:
    """The first line of whatever the harness, the code of a task or the hub raises."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{doing}: {one_line(first_line(error))}") from error


def _scores(
    folder: Path,
    config: RunConfig,
    shape: ModelShape,
    options: TaskOptions,
    loaded: dict[str, Any],
    wanted: Sequence[int],
) -> TaskScores:
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    from fedflame.base.adapted import load_adapted_model
    from fedflame.base.out_of_memory import memory_in_words
    from fedflame.base.peak_memory import forget_peak, peak_memory
    from fedflame.experiment.speed import measure_speed

    run = is_run(folder)
    device, dtype = place(config, shape, saved_dtype(folder) if run else None, 0)
    adapted, tokenizer = load_adapted_model(
        config.model.model_name_or_path, dtype.name, config.adapter, device=device.name
    )
    if template := _own_template(folder):
        tokenizer.chat_template = template
    if options.apply_chat_template and not tokenizer.chat_template:
        raise UserError("--apply-chat-template: the tokenizer has no chat template")
    state_at = source_states(folder, adapted, config.seed)
    by_k = []
    for k in wanted:
        state = state_at(k)
        adapted.load(state.adapter_at(k), state.rescaler_at(k, len(adapted.layers)), state.merged)
        forget_peak(adapted.devices)
        doing = f"evaluating at k = {k}", "a smaller --batch-size, "
        with adapted.active_experts(k):
            with _harness_in_words("the harness failed"), memory_in_words(adapted.device, *doing):
                model = HFLM(pretrained=adapted.model, tokenizer=tokenizer, batch_size=options.batch_size)
                metrics = _metrics(model, loaded, options)
            with memory_in_words(adapted.device, *doing):
                speed = measure_speed(adapted)
        by_k.append(
            ScoresAtK(
                active_experts=k,
                metrics=metrics,
                prompt_tokens_per_second=speed.prompt,
                new_tokens_per_second=speed.new,
                peak_memory=peak_memory(adapted.devices),
            )
        )
    return TaskScores(
        round=kept_round(folder) if run else 0,
        lm_eval=lm_eval.__version__,
        num_fewshot=options.num_fewshot,
        limit=options.limit,
        apply_chat_template=options.apply_chat_template,
        device=_device_name(adapted),
        dtype=dtype.name,
        by_k=by_k,
    )


def _own_template(folder: Path) -> str:
    """The chat template that the source was trained with, where it is not the base model's own."""
    if is_run(folder):
        form = saved_prompt_form(folder)
        return form.jinja if form.template == "given" else ""
    file = folder / "chat_template.jinja"
    return file.read_text(encoding="utf-8") if is_adapter(folder) and file.is_file() else ""


def _device_name(adapted: AdaptedModel) -> str:
    import torch

    cards = [torch.cuda.get_device_name(device) for device in adapted.devices if device.type == "cuda"]
    return ", ".join(cards) or f"a CPU, {plural(torch.get_num_threads(), 'thread')}"


def _metrics(model: Any, loaded: dict[str, Any], options: TaskOptions) -> list[Metric]:
    """What the harness says of the model as it is now; with its seeds, so that every k sees the same text."""
    import numpy as np
    import torch
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
    from lm_eval.evaluator import evaluate

    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    torch.manual_seed(DEFAULT_OTHER_SEED)
    for task in loaded["tasks"].values():
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
    found: Any = evaluate(
        lm=model,
        task_dict=loaded,
        limit=options.limit,
        log_samples=False,
        apply_chat_template=options.apply_chat_template,
        fewshot_as_multiturn=options.apply_chat_template,
    )
    results: dict[str, dict[str, Any]] = found["results"]
    asked = [name for name in options.tasks if _of_task(name, results.get(name, {}))]
    shown = asked if len(asked) == len(options.tasks) else list(results)
    return [metric for name in shown for metric in _of_task(name, results[name])]


def _of_task(task: str, values: Mapping[str, Any]) -> list[Metric]:
    """The metrics of one task or group: `acc,none` is a value and `acc_stderr,none` its standard error."""
    metrics = []
    for key, value in values.items():
        name, comma, kind = key.partition(",")
        if not comma or name.endswith("_stderr") or not isinstance(value, int | float):
            continue
        stderr = values.get(f"{name}_stderr,{kind}")
        metrics.append(
            Metric(
                task=one_line(task),
                name=one_line(name if kind == "none" else key),
                value=float(value),
                stderr=float(stderr) if isinstance(stderr, int | float) else None,
            )
        )
    return metrics
