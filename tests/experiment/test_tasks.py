"""Tasks of lm-evaluation-harness on the live model, held to the harness on the merged export."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import lm_eval.tasks
import pytest
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tests.json_lines import write_lines
from tests.tiny_runs import invoke
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedflame.errors import UserError
from fedflame.experiment.tasks import TaskOptions, evaluate_tasks
from fedflame.report import write_report
from fedflame.report.tasks import task_headers, task_rows
from fedflame.run_files.task_scores import TaskScores, read_task_scores, write_task_scores

pytestmark = pytest.mark.slow

DATA = """\
dataset_path: json
dataset_kwargs:
  data_files: {{test: {rows}}}
test_split: test
fewshot_split: test
doc_to_text: "{{{{question}}}}"
"""
CHOICES = """\
task: colours
output_type: multiple_choice
doc_to_target: "{{answer}}"
doc_to_choice: ["red", "green", "light blue"]
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
LIKELIHOOD = """\
task: likely
output_type: loglikelihood
doc_to_target: "{{words}}"
metric_list: [{metric: perplexity, aggregation: perplexity, higher_is_better: false}]
"""
WITHOUT_EXAMPLES = """\
task: alone
num_fewshot: 0
output_type: loglikelihood
doc_to_target: "{{words}}"
metric_list: [{metric: perplexity, aggregation: perplexity, higher_is_better: false}]
"""
ANSWERS = """\
task: written
output_type: generate_until
doc_to_target: "{{words}}"
generation_kwargs: {until: [" "], max_gen_toks: 3, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
GROUP = """\
group: together
task: [colours]
aggregate_metric_list: [{metric: acc, weight_by_size: true}]
"""
NAMES = ("colours", "likely", "alone", "written")


@pytest.fixture(scope="module")
def finished(undisturbed: Callable[..., Path]) -> Path:
    # A large step, so that adapter and rescaler show in every score.
    return undisturbed("server.num_server_rounds=2", "training.learning_rate=0.05")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with four tasks over nine rows, and a group of one of them."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [{"question": f"what is {i}? ", "answer": i % 3, "words": f"{i} is odd"} for i in range(9)]
    write_lines(folder / "rows.jsonl", rows)
    for text in (CHOICES, LIKELIHOOD, WITHOUT_EXAMPLES, ANSWERS):
        name = text.split()[1]
        (folder / f"{name}.yaml").write_text(DATA.format(rows=folder / "rows.jsonl") + text)
    (folder / "together.yaml").write_text(GROUP)
    return folder


@pytest.fixture(autouse=True, scope="module")
def only_these_tasks() -> Iterator[None]:
    """The harness looks through its own 14,000 tasks for seconds; most tests need none of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lm_eval.tasks.TaskManager", partial(TaskManager, include_defaults=False))
        yield


@pytest.fixture(scope="module")
def scored(finished: Path, tasks: Path) -> TaskScores:
    return evaluate_tasks(str(finished), TaskOptions(NAMES, tasks, num_fewshot=1), (4, 2, 1))


def test_the_live_model_scores_as_its_merged_export_at_every_k(
    finished: Path, tasks: Path, scored: TaskScores, tmp_path: Path
) -> None:
    manager = TaskManager(include_path=tasks, include_defaults=False)
    perplexities = []
    for at_k in scored.by_k:
        k, to = at_k.active_experts, tmp_path / f"k{at_k.active_experts}"
        result = invoke("export", finished, "--to", to, "--merge", "--active-experts", str(k))
        assert result.exit_code == 0, result.stderr
        model = AutoModelForCausalLM.from_pretrained(to)
        assert model.config.num_experts_per_tok == k
        stock = HFLM(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(to), batch_size=3)
        found = simple_evaluate(
            stock, tasks=list(NAMES), task_manager=manager, num_fewshot=1, log_samples=False
        )
        assert found is not None
        for metric in at_k.metrics:
            wanted = found["results"][metric.task]
            assert metric.value == pytest.approx(wanted[f"{metric.name},none"], rel=1e-5), metric
            assert metric.stderr == pytest.approx(wanted[f"{metric.name}_stderr,none"], rel=1e-4), metric
        assert {metric.task for metric in at_k.metrics} == {*NAMES}
        perplexities += [metric.value for metric in at_k.metrics if metric.name == "perplexity"]
    assert len({round(value, 2) for value in perplexities}) == 6  # so the tiers do differ


def test_speed_and_memory_are_measured_at_every_k(scored: TaskScores) -> None:
    for at_k in scored.by_k:
        assert at_k.prompt_tokens_per_second > at_k.new_tokens_per_second > 0
        assert at_k.peak_memory is None or at_k.peak_memory > 10_000_000


def test_scores_of_a_run_are_kept_and_reported(finished: Path, scored: TaskScores, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for name in ("config", "environment", "partition", "plan"):
        (run / f"{name}.json").write_bytes((finished / f"{name}.json").read_bytes())
    (run / "metrics.jsonl").write_bytes((finished / "metrics.jsonl").read_bytes())
    assert "prompt tokens/s" not in write_report(run).read_text()
    write_task_scores(run, scored)
    assert read_task_scores(run) == scored
    page = write_report(run).read_text()
    [*_, accuracy] = [row for row in task_rows(scored) if row[0] == "likely perplexity"]
    for text in ("prompt tokens/s", "After round 2", *accuracy):
        assert text in page
    assert task_headers(scored) == ["task", "k = 4", "k = 2", "k = 1"]


def test_the_command_prints_what_it_keeps(finished: Path, tasks: Path) -> None:
    before = {path.name for path in finished.iterdir()}
    options = ("--include-path", tasks, "--limit", "2", "--active-experts", "2")
    result = invoke("evaluate", finished, "--tasks", "likely", *options)
    assert result.exit_code == 0, result.stderr
    kept = read_task_scores(finished)
    assert kept is not None and kept.limit == 2
    [at_k] = kept.by_k
    [metric] = at_k.metrics
    assert f"{metric.value:.4f}" in result.stdout
    assert "likely perplexity" in (finished / "report.html").read_text()
    assert {path.name for path in finished.iterdir()} - before == {"tasks.json"}
    assert result.stderr == ""


def test_a_base_model_is_scored_at_any_k(tiny_folder: Path, tasks: Path) -> None:
    scores = evaluate_tasks(str(tiny_folder), TaskOptions(["likely"], tasks, limit=2), [3])
    assert [at_k.active_experts for at_k in scores.by_k] == [3]


def test_an_adapter_folder_scores_as_its_run(finished: Path, tasks: Path, scored: TaskScores) -> None:
    source, options = str(finished / "adapter"), TaskOptions(["likely"], tasks, num_fewshot=1)
    [at_k] = evaluate_tasks(source, options, [2], ["adapter.r=3"]).by_k
    [metric] = at_k.metrics
    of_run = {(of_k.active_experts, one.task): one.value for of_k in scored.by_k for one in of_k.metrics}
    assert metric.value == pytest.approx(of_run[2, "likely"], rel=1e-5)
    with pytest.raises(UserError, match=r"--active-experts 3: .*adapter has an adapter for k = 4, 2, 1"):
        evaluate_tasks(source, options, [3])


def test_a_group_has_one_row_where_it_has_a_score_of_its_own(
    finished: Path, tasks: Path, scored: TaskScores
) -> None:
    found = evaluate_tasks(str(finished), TaskOptions(["together"], tasks, num_fewshot=1), [4])
    [metric] = found.by_k[0].metrics
    [wanted] = [one.value for one in scored.by_k[0].metrics if one.task == "colours"]
    assert (metric.task, metric.name, metric.value) == ("together", "acc", wanted)


def test_a_run_that_is_being_written_is_not_evaluated(
    finished: Path, tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(run: Path) -> None:
        raise UserError(f"{run}: another process writes this run folder")

    monkeypatch.setattr("fedflame.experiment.tasks.refuse_used", refuse)
    monkeypatch.setattr("fedflame.experiment.tasks._load_tasks", None)
    result = invoke("evaluate", finished, "--tasks", "likely")
    assert (result.exit_code, result.stderr) == (
        2,
        f"fedflame: {finished}: another process writes this run folder\n",
    )


def test_a_damaged_file_of_scores_is_refused(scored: TaskScores, tmp_path: Path) -> None:
    write_task_scores(tmp_path, scored)
    file = tmp_path / "tasks.json"
    file.write_text(file.read_text().replace('"round": 2', '"round": 3'))
    with pytest.raises(UserError, match=r"tasks\.json: its checksum is wrong.*evaluate the tasks again"):
        read_task_scores(tmp_path)
    write_task_scores(tmp_path, scored.model_copy(update={"round": -1}))
    with pytest.raises(UserError, match=r"tasks\.json: round: Input should be greater than or equal to 0"):
        read_task_scores(tmp_path)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (("--tasks", "nonesuch"), "--tasks nonesuch: no such task, group or tag"),
        (
            ("--tasks", "likely", "--active-experts", "3"),
            "--active-experts 3: RUN has an adapter for k = 4, 2, 1",
        ),
        (("--tasks", "likely", "--active-experts", "5"), "active_experts 5: must be between 1 and 4"),
        (("--tasks", "likely", "--apply-chat-template"), "--apply-chat-template: the tokenizer has no chat"),
        (("--tasks", "likely", "--limit", "0"), "--limit 0: must be rows, or a share of them"),
        (("--tasks", "likely", "--limit", "nan"), "--limit nan: must be rows, or a share of them"),
        (("--tasks", ","), "--tasks: names no task"),
        (
            ("--limit", "3"),
            "--include-path, --num-fewshot, --limit, --apply-chat-template, --batch-size need",
        ),
    ],
)
def test_what_cannot_be_evaluated_is_one_line(
    finished: Path, tasks: Path, options: tuple[str, ...], line: str
) -> None:
    given = ("--include-path", str(tasks)) if "likely" in options else ()
    result = invoke("evaluate", finished, *options, *given)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("fedflame: " + line.replace("RUN", str(finished)))
    assert result.stderr.count("\n") == 1


def test_a_task_of_the_hub_is_one_line_offline(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def one_of_its_own(include_path: None) -> TaskManager:
        """The harness' tasks, which it is asked for by leaving out `include_defaults`, but for all others."""
        return TaskManager(
            include_path=Path(lm_eval.tasks.__file__).parent / "hellaswag", include_defaults=False
        )

    monkeypatch.setattr("lm_eval.tasks.TaskManager", one_of_its_own)
    result = invoke("evaluate", finished, "--tasks", "hellaswag")
    assert (result.exit_code, result.stdout) == (2, "")
    line = "fedflame: --tasks hellaswag: cannot be loaded: Couldn't reach 'Rowan/hellaswag' on the Hub"
    assert result.stderr.startswith(line) and result.stderr.count("\n") == 1


def test_a_folder_of_tasks_that_is_not_there_is_refused(finished: Path, tmp_path: Path) -> None:
    result = invoke("evaluate", finished, "--tasks", "likely", "--include-path", tmp_path / "none")
    assert (result.exit_code, result.stderr) == (
        2,
        f"fedflame: --include-path {tmp_path / 'none'}: no such folder\n",
    )


def test_without_the_harness_the_line_says_what_to_install(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    result = invoke("evaluate", finished, "--tasks", "likely")
    assert (result.exit_code, result.stderr) == (
        2,
        "fedflame: --tasks needs lm-evaluation-harness: pip install 'fedflame[eval]'\n",
    )


def test_the_harness_is_loaded_for_tasks_only() -> None:
    program = "import sys, fedflame.commands.evaluate, fedflame.report; print('lm_eval' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env={**os.environ})
    assert ran.stdout == "False\n", ran.stderr
