"""The model card against results made up here, and against the real ones where they are."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

import corpus
import model_card
from recipes import RECIPES, SMALL, TINY, Recipe

LAYERS, EXPERTS = 4, 32
PER_POINT = 500 * 8 * 256


def made_up() -> dict[str, Any]:
    """26 points, dense skills from point 9 on; loads 0.5 and 1.5 of uniform in turn."""
    curve = []
    for number in range(1, 27):
        point = {"tokens": number * PER_POINT, "training": 6.0 - 0.1 * number, "text": 5.0, "skills": 2.0}
        curve.append(point | ({"dense skills": 1.0 + 0.01 * number} if number > 8 else {}))
    bases = {"text": 3.0, "skills": 2.0, "dense skills": 1.0}
    losses = {str(k): {name: base + 1 / k for name, base in bases.items()} for k in (8, 4, 2, 1)}
    return {
        "step": 13_000,
        "cpu_seconds": 9_000.0,
        "wall_seconds": 5_400.0,
        "curve": curve,
        "loss_by_active_experts": losses,
        "expert_load": [[0.5 / EXPERTS, 1.5 / EXPERTS] * (EXPERTS // 2) for _ in range(LAYERS)],
    }


def write(folder: Path, results: dict[str, Any]) -> str:
    path, card = folder / "results.json", folder / "README.md"
    path.write_text(json.dumps(results))
    model_card.write_card(TINY, path, card)
    return card.read_text()


def test_figures_are_those_of_the_results(tmp_path: Path) -> None:
    text = write(tmp_path, made_up())
    prose = " ".join(text.split())
    assert "2.5 hours of CPU time, 1.5 hours by the clock" in prose
    assert "13,000 steps of 8 sequences of 256 tokens, 26,624,000 tokens" in prose
    assert "| 8.2 | 5.200 | 5.000 | 2.000 | - |" in text, "the end of the first phase is always there"
    assert "| 26.6 | 3.400 | 5.000 | 2.000 | 1.260 |" in text
    assert "| 3 | 32 of 32 | 0.50 | 1.50 |" in text
    assert "| 3.125 | - | 2.125 | - | 1.125 | - |" in text
    assert "| 3.250 | +0.125 | 2.250 | +0.125 | 1.250 | +0.125 |" in text
    assert "| 4.000 | +0.500 | 3.000 | +0.500 | 2.000 | +0.500 |" in text


def test_the_card_starts_with_hugging_face_front_matter(tmp_path: Path) -> None:
    lines = write(tmp_path, made_up()).splitlines()
    end = lines.index("---", 1)
    assert lines[0] == "---"
    assert {"license: apache-2.0", "language: en", "library_name: transformers"} < set(lines[1:end])
    assert {"  - moe", "  - olmoe"} < set(lines[1:end])


def test_every_file_of_the_corpus_is_attributed_and_no_other() -> None:
    assert model_card.SOURCES.keys() == corpus.OPEN_FILES.keys()
    rows = [line for line in model_card.corpus_section(TINY).splitlines() if ".jsonl.gz |" in line]
    assert len(rows) == len(corpus.OPEN_FILES)


def test_the_curve_is_thinned_to_about_twelve_points_with_both_ends() -> None:
    curve = made_up()["curve"]
    points = model_card.thinned(TINY, curve)
    assert points[0] is curve[0] and points[-1] is curve[-1] and curve[7] in points
    assert 12 <= len(points) <= 13
    assert points == sorted(points, key=lambda point: point["tokens"])
    assert model_card.thinned(TINY, curve[:3]) == curve[:3]


@pytest.mark.parametrize(("recipe", "hidden", "width"), [(TINY, 128, 48), (SMALL, 256, 64)])
def test_parameters_by_hand(recipe: Recipe, hidden: int, width: int) -> None:
    """Tied embedding; per layer 4 projections, 4 norms, router and k experts; and the last norm."""
    layer = 4 * hidden * hidden + 4 * hidden + 32 * hidden
    for k in (32, 8, 1):
        by_hand = 4096 * hidden + 4 * (layer + k * 3 * hidden * width) + hidden
        assert model_card.parameters(recipe, k) == by_hand


def test_spans() -> None:
    assert model_card.span(9_000.0) == "2.5 hours"
    assert model_card.span(90.0) == "1.5 minutes"


def test_training_settings_that_the_card_spells_out_are_those_of_the_code() -> None:
    code = (Path(model_card.__file__).parent / "train.py").read_text()
    assert "betas=(0.9, 0.95), weight_decay=0.05" in code
    assert "clip_grad_norm_(model.parameters(), 1.0)" in code
    assert "number % 6 == 0" in Path(corpus.__file__).read_text()


def test_an_unused_expert_is_refused(tmp_path: Path) -> None:
    results = made_up()
    results["expert_load"][2][5] = 0.0
    assert refusal(tmp_path, results) == "layer 2: experts without a token: [5]; every expert must be used"


def test_a_layer_too_few_is_refused(tmp_path: Path) -> None:
    results = made_up()
    del results["expert_load"][0]
    assert refusal(tmp_path, results) == "expert_load: not 4 layers of 32 experts"


@pytest.mark.parametrize("name", ["text", "skills", "dense skills"])
@pytest.mark.parametrize("k", ["4", "2", "1"])
@pytest.mark.parametrize("value", ["equal", "lower", "nan"])
def test_a_loss_that_does_not_rise_with_falling_k_is_refused(
    tmp_path: Path, name: str, k: str, value: str
) -> None:
    results = made_up()
    losses = results["loss_by_active_experts"]
    above = losses[str(2 * int(k))][name]
    losses[k][name] = {"equal": above, "lower": above - 0.1, "nan": float("nan")}[value]
    message = refusal(tmp_path, results)
    assert message.startswith(f"{name}: loss {above:.3f} at k = {2 * int(k)}, ")
    assert message.endswith("it must rise as k falls")


def refusal(folder: Path, results: dict[str, Any]) -> str:
    """The one line; nothing is written."""
    with pytest.raises(SystemExit) as refused:
        write(folder, results)
    assert not (folder / "README.md").exists()
    message = str(refused.value)
    assert "\n" not in message
    return message


def test_without_results_or_model_folder_it_says_what_writes_them(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"nothing\.json: no such file; pretraining/train\.py"):
        model_card.write_card(TINY, tmp_path / "nothing.json", tmp_path / "README.md")
    (tmp_path / "results.json").write_text(json.dumps(made_up()))
    with pytest.raises(SystemExit, match=r"absent: no such folder; pretraining/train\.py"):
        model_card.write_card(TINY, tmp_path / "results.json", tmp_path / "absent" / "README.md")


def test_the_order_of_k_in_the_file_does_not_matter(tmp_path: Path) -> None:
    results = made_up()
    turned = copy.deepcopy(results)
    turned["loss_by_active_experts"] = dict(reversed(results["loss_by_active_experts"].items()))
    assert write(tmp_path, turned) == write(tmp_path, results)


# The real results


@pytest.fixture(params=RECIPES.values(), ids=list(RECIPES))
def recipe(request: pytest.FixtureRequest) -> Recipe:
    kept: Recipe = request.param
    return kept


def results_of(recipe: Recipe) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(recipe.results.read_text())
    return loaded


def test_the_card_beside_the_weights_is_the_one_that_the_results_give(recipe: Recipe) -> None:
    results = results_of(recipe)
    model_card.require_usable(recipe, results)
    assert (recipe.folder / "README.md").read_text() == model_card.card(recipe, results)


def test_the_weights_have_the_parameters_that_the_card_says(recipe: Recipe) -> None:
    total = 0
    for path in recipe.folder.glob("*.safetensors"):
        with safe_open(path, "pt") as weights:
            total += sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118
    assert total == model_card.parameters(recipe, EXPERTS)


def test_the_readme_of_the_folder_quotes_the_curve() -> None:
    readme = (Path(model_card.__file__).parent / "README.md").read_text()
    points = {point["tokens"]: point for point in results_of(TINY)["curve"]}
    quoted = [(4, "skills"), (8, "skills"), (11, "dense skills"), (12, "dense skills")]
    for number, name in quoted:
        point = points[number * 1_024_000]
        assert f"| {point['tokens'] / 1e6:.1f} |" in readme
        assert f" {point[name]:.3f} |" in readme, (number, name)
