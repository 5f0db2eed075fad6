"""Exported adapters and merged checkpoints, held against our own forward and against numpy."""

import json
import os
import resource
import shutil
import stat
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from tests.tiny_exports import (
    MODELS,
    SIZES,
    TIERS,
    K,
    R,
    adapt,
    load,
    logits,
    our_logits,
    peft_logits,
    random_state,
    run_config,
    save_base,
)
from transformers import OlmoeConfig, OlmoeForCausalLM, PreTrainedTokenizerFast

from fedflame.errors import UserError
from fedflame.experiment.adapter_folder import trained_run
from fedflame.exports import (
    CardFacts,
    export_adapter,
    load_adapter,
    load_rescalers,
    load_tier_adapters,
    merge_checkpoint,
    read_settings,
)
from fedflame.exports.new_folder import RUN_FILE, new_folder
from fedflame.messages import NOTHING, Adapter
from fedflame.moe.adapted_model import AdaptedModel
from fedflame.strategies.base import ServerState


def with_merged(state: ServerState, rank: int) -> ServerState:
    """The state with random factors of this rank in its base."""
    generator = torch.Generator().manual_seed(rank)
    values = {}
    for name, value in state.adapter.tensors().items():
        shape = [size * rank // R if size in (R, 2 * R) else size for size in value.shape]
        values[name] = torch.randn(shape, generator=generator) * 0.2
    return replace(state, merged=Adapter.from_tensors(values))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base("olmoe", tmp_path_factory.mktemp("models") / "olmoe")


@pytest.fixture(scope="module")
def adapted(base: Path) -> AdaptedModel:
    return adapt(base)


@pytest.fixture(scope="module")
def state(adapted: AdaptedModel) -> ServerState:
    return random_state(adapted)


@pytest.fixture
def exported(base: Path, adapted: AdaptedModel, state: ServerState, tmp_path: Path) -> Path:
    export_adapter(state, trained_run(run_config(base), 4), adapted.model, tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize("merged_rank", [0, 6])
def test_peft_in_a_fresh_process_gives_our_logits(
    base: Path, adapted: AdaptedModel, state: ServerState, tmp_path: Path, merged_rank: int
) -> None:
    state, exported = with_merged(state, merged_rank) if merged_rank else state, tmp_path / "adapter"
    export_adapter(state, trained_run(run_config(base), 4), adapted.model, exported)
    [(plain, peft)] = peft_logits([(base, exported)])
    ours = our_logits(adapted, state, K)
    torch.testing.assert_close(peft, ours, rtol=1e-5, atol=1e-5 * float(ours.abs().max()))
    assert float((plain - ours).abs().max()) > 0.1 * float(ours.abs().max())


def test_the_names_and_values_of_one_expert(exported: Path, state: ServerState) -> None:
    tensors = load_file(exported / "adapter_model.safetensors")
    assert len(tensors) == 2 * (6 * 3 * 2 + 4 * 2)
    prefix, bank = "base_model.model.model.layers.1.mlp.experts.4.", state.adapter.experts
    expected = {
        "gate_proj.lora_A": bank["1.A1"][4, :4],
        "up_proj.lora_A": bank["1.A1"][4, 4:],
        "gate_proj.lora_B": bank["1.B1"][4, :20],
        "up_proj.lora_B": bank["1.B1"][4, 20:],
        "down_proj.lora_A": bank["1.A2"][4],
        "down_proj.lora_B": bank["1.B2"][4],
    }
    for name, value in expected.items():
        assert torch.equal(tensors[f"{prefix}{name}.weight"], value), name
    attention = tensors["base_model.model.model.layers.0.self_attn.k_proj.lora_B.weight"]
    assert torch.equal(attention, state.adapter.attention["model.layers.0.self_attn.k_proj.B"])


def test_a_model_without_weights_exports_the_same_bytes(
    base: Path, adapted: AdaptedModel, state: ServerState, exported: Path, tmp_path: Path
) -> None:
    with torch.device("meta"):
        hollow = MODELS["olmoe"]()
    export_adapter(state, trained_run(run_config(base), 4), hollow, tmp_path / "hollow")
    files = sorted(path.name for path in exported.iterdir())
    assert files == sorted(path.name for path in (tmp_path / "hollow").iterdir())
    for name in files:
        assert (exported / name).read_bytes() == (tmp_path / "hollow" / name).read_bytes(), name


def test_what_the_folder_says(base: Path, exported: Path) -> None:
    facts = json.loads((exported / "fedflame.json").read_text())
    assert facts["base_model"] == str(base)
    assert facts["num_experts_per_tok"] == K
    assert facts["tiers"] == [3, 2, 1]
    assert facts["rounds"] == 4
    assert facts["strategy"]["name"] == "flame"
    settings = json.loads((exported / "adapter_config.json").read_text())
    assert settings["target_modules"] == "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()
    assert (settings["r"], settings["lora_alpha"], settings["task_type"]) == (4, 6.0, "CAUSAL_LM")
    card = (exported / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: peft\n")
    assert "4 federated rounds" in card
    assert "| 1 | 1.8750 | 1.5000 to 2.2500 |" in card


def test_whoever_can_read_other_new_files_can_read_the_weights(
    base: Path, adapted: AdaptedModel, state: ServerState, tmp_path: Path
) -> None:
    """safetensors writes files for their owner alone; a server often runs as another user."""
    before = os.umask(0o027)
    try:
        export_adapter(
            with_tiers(state), trained_run(run_config(base), 4), adapted.model, tmp_path / "adapter"
        )
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "adapter").rglob("*") if path.is_file()]
    assert len({path for path in files if path.suffix == ".safetensors"}) > 3
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o640}


def test_the_card_names_a_base_of_the_hub(adapted: AdaptedModel, state: ServerState, tmp_path: Path) -> None:
    export_adapter(state, trained_run(run_config(Path("allenai/OLMoE")), 1), adapted.model, tmp_path / "a")
    assert (tmp_path / "a" / "README.md").read_text().startswith("---\nbase_model: allenai/OLMoE\n")
    assert "\nbase_model_relation: adapter\n" in (tmp_path / "a" / "README.md").read_text()


def test_the_card_names_a_data_set_of_the_hub_and_no_value_that_is_not_finite(
    base: Path, adapted: AdaptedModel, state: ServerState, tmp_path: Path
) -> None:
    facts = CardFacts("owner/rows", {3: {"loss": float("nan"), "exact_match": 0.25}})
    run = replace(trained_run(run_config(base), 1), base_model="olmoe-tiny", card=facts)
    export_adapter(state, run, adapted.model, tmp_path / "a")
    data = ModelCard.load(tmp_path / "a" / "README.md").data
    assert data.datasets == "owner/rows" and data.base_model is None
    [result] = data.eval_results
    assert (result.dataset_type, result.metric_type, result.metric_value) == (
        "owner/rows",
        "exact_match",
        0.25,
    )


def with_tiers(state: ServerState) -> ServerState:
    """The state with an adapter of its own at k = 2 and 1."""
    own = {k: state.adapter.combine(state.adapter, lambda a, _, k=k: a * (1 + k)) for k in (2, 1)}  # type: ignore[misc]
    return replace(state, tier_adapters=own)


def test_adapters_of_one_k_are_adapter_folders_below(
    base: Path, adapted: AdaptedModel, state: ServerState, tmp_path: Path
) -> None:
    state, folder = with_tiers(state), tmp_path / "adapter"
    export_adapter(state, trained_run(run_config(base), 4), adapted.model, folder)
    assert {path.name for path in folder.iterdir() if path.is_dir()} == {"k2", "k1"}
    assert "The folders `k2`, `k1` below" in (folder / "README.md").read_text()
    back = load_tier_adapters(folder, adapted, seed=0)
    assert back.keys() == {2, 1}
    for k, adapter in {3: load_adapter(folder, adapted, seed=0), **back}.items():
        for name, value in state.adapter_at(k).tensors().items():
            assert torch.equal(adapter.tensors()[name], value), (k, name)
    for k, (_, peft) in zip((2, 1), peft_logits([(base, folder / "k2"), (base, folder / "k1")]), strict=True):
        ours = our_logits(adapted, replace(state, adapter=state.adapter_at(k)), K)
        torch.testing.assert_close(peft, ours, rtol=1e-5, atol=1e-5 * float(ours.abs().max()))


@pytest.mark.parametrize("k", TIERS)
def test_a_merged_checkpoint_has_the_adapter_of_its_k(
    k: int, base: Path, adapted: AdaptedModel, state: ServerState, tmp_path: Path
) -> None:
    merge_checkpoint(with_tiers(state), trained_run(run_config(base), 4), k, tmp_path / "merged")
    of_k = replace(state, adapter=with_tiers(state).adapter_at(k))
    ours = our_logits(adapted, of_k, k)
    got = logits(load(tmp_path / "merged"))
    torch.testing.assert_close(got, ours, rtol=1e-5, atol=1e-5 * float(ours.abs().max()))
    if k < K:
        assert float((our_logits(adapted, state, k) - ours).abs().max()) > 0.01 * float(ours.abs().max())


def test_round_trip_is_exact(base: Path, adapted: AdaptedModel, state: ServerState, exported: Path) -> None:
    settings = read_settings(exported)
    assert settings.base_model == str(base)
    assert settings.adapter == run_config(base).adapter
    back = load_adapter(exported, adapted, seed=0)
    assert back.tensors().keys() == state.adapter.tensors().keys()
    for name, value in state.adapter.tensors().items():
        assert torch.equal(back.tensors()[name], value), name
    rescalers = load_rescalers(exported, adapted)
    assert {k: s.tolist() for k, s in rescalers.items()} == {3: [1, 1], 2: [1.25, 0.75], 1: [1.5, 2.25]}


def test_merged_factors_come_back_as_further_ranks_at_the_same_scaling(
    base: Path, adapted: AdaptedModel, state: ServerState, tmp_path: Path
) -> None:
    state = with_merged(state, 6)
    export_adapter(state, trained_run(run_config(base), 4), adapted.model, tmp_path / "adapter")
    settings = read_settings(tmp_path / "adapter").adapter
    assert (settings.r, settings.lora_alpha) == (4 + 6, 6.0 * 10 / 4)
    wide = adapt(base, settings.r, settings.lora_alpha)
    back = ServerState(
        load_adapter(tmp_path / "adapter", wide, seed=0), load_rescalers(tmp_path / "adapter", wide)
    )
    for k in TIERS:
        ours = our_logits(adapted, state, k)
        torch.testing.assert_close(
            our_logits(wide, back, k), ours, rtol=1e-5, atol=1e-5 * float(ours.abs().max())
        )
        assert float((our_logits(adapted, replace(state, merged=NOTHING), k) - ours).abs().max()) > 0.1


@pytest.mark.parametrize(
    "kind", ["olmoe", "qwen2_moe"]
)  # qwen2_moe has a shared expert, which s must not touch
@pytest.mark.parametrize("k", TIERS)
@pytest.mark.parametrize("merged_rank", [0, 6])
def test_merged_checkpoint_gives_our_logits(kind: str, k: int, merged_rank: int, tmp_path: Path) -> None:
    base = save_base(kind, tmp_path / "base")
    adapted = adapt(base)
    state = random_state(adapted)
    state = with_merged(state, merged_rank) if merged_rank else state
    merge_checkpoint(state, trained_run(run_config(base), 4), k, tmp_path / "merged")
    merged = load(tmp_path / "merged")
    assert merged.config.num_experts_per_tok == k
    ours = our_logits(adapted, state, k)
    torch.testing.assert_close(logits(merged), ours, rtol=1e-5, atol=1e-5 * float(ours.abs().max()))
    assert float((logits(load(base)) - ours).abs().max()) > 0.1 * float(ours.abs().max())
    words = PreTrainedTokenizerFast.from_pretrained(tmp_path / "merged")("w7 w9")["input_ids"]
    assert words == [7, 9]


def test_merged_weights_by_hand_in_the_dtype_of_the_base(tmp_path: Path, state: ServerState) -> None:
    base = save_base("olmoe", tmp_path / "base", torch.bfloat16)
    merge_checkpoint(state, trained_run(run_config(base), 4), 1, tmp_path / "merged")
    before = load_file(base / "model.safetensors")
    after = load_file(tmp_path / "merged" / "model.safetensors")
    assert before.keys() == after.keys()
    assert {value.dtype for value in after.values()} == {torch.bfloat16}
    bank = {name: value.double().numpy() for name, value in state.adapter.experts.items()}
    low = {
        "gate_proj": bank["1.B1"][4, :20] @ bank["1.A1"][4, :4],
        "up_proj": bank["1.B1"][4, 20:] @ bank["1.A1"][4, 4:],
        "down_proj": bank["1.B2"][4] @ bank["1.A2"][4],
    }
    for projection, product in low.items():
        name = f"model.layers.1.mlp.experts.4.{projection}.weight"
        s = 2.25 if projection == "down_proj" else 1.0
        expected = s * (before[name].double().numpy() + 1.5 * product)
        error = np.abs(after[name].double().numpy() - expected)
        assert (error <= np.abs(expected) * 2.0**-8 + 1e-6).all(), projection  # one rounding to 8 bits
    for name in ("model.layers.1.mlp.gate.weight", "model.embed_tokens.weight"):
        assert torch.equal(before[name], after[name])


def test_merge_refuses_a_k_that_no_client_had(base: Path, state: ServerState, tmp_path: Path) -> None:
    few = ServerState(state.adapter, {1: torch.ones(2)})
    with pytest.raises(UserError, match="k = 2: no client had this tier; allowed are 3, 1"):
        merge_checkpoint(few, trained_run(run_config(base), 1), 2, tmp_path / "merged")
    assert not list(tmp_path.iterdir())
    merge_checkpoint(few, trained_run(run_config(base), 1), 3, tmp_path / "merged")


def test_merge_leaves_the_k_of_the_base_at_full_k_without_a_tier(
    base: Path, adapted: AdaptedModel, state: ServerState, tmp_path: Path
) -> None:
    merge_checkpoint(ServerState(state.adapter, {}), trained_run(run_config(base), 1), K, tmp_path / "merged")
    ours = our_logits(adapted, state, K)
    torch.testing.assert_close(
        logits(load(tmp_path / "merged")), ours, rtol=1e-5, atol=1e-5 * float(ours.abs().max())
    )


def test_a_base_that_is_not_the_runs_is_refused(state: ServerState, tmp_path: Path) -> None:
    with torch.device("meta"):
        other = OlmoeForCausalLM(OlmoeConfig(intermediate_size=24, **SIZES))
    with pytest.raises(
        UserError, match=r"not the run's: 0\.A2 is \(6, 4, 20\); the model needs \(6, 4, 24\)"
    ):
        export_adapter(state, trained_run(run_config(tmp_path), 1), other, tmp_path / "adapter")
    with torch.device("meta"):
        other = OlmoeForCausalLM(OlmoeConfig(intermediate_size=20, **{**SIZES, "num_key_value_heads": 4}))
    with pytest.raises(UserError, match=r"self_attn\.k_proj\.B is \(16, 4\); the model needs \(32, 4\)"):
        export_adapter(state, trained_run(run_config(tmp_path), 1), other, tmp_path / "adapter")


def test_merging_into_another_base_is_refused(base: Path, state: ServerState, tmp_path: Path) -> None:
    deeper = ServerState(
        Adapter({**state.adapter.experts, "2.A1": torch.ones(6, 8, 32)}, {}), state.rescalers
    )
    with pytest.raises(UserError, match=r"not the run's: 2\.A1 is \(6, 8, 32\); the model needs nothing"):
        merge_checkpoint(deeper, trained_run(run_config(base), 1), K, tmp_path / "merged")
    assert not list(tmp_path.iterdir())


def test_an_earlier_export_is_replaced_only_when_asked(
    base: Path, adapted: AdaptedModel, state: ServerState, exported: Path
) -> None:
    (exported / "mine.txt").write_text("kept")
    with pytest.raises(UserError, match="holds an earlier export; --overwrite replaces it"):
        export_adapter(state, trained_run(run_config(base), 5), adapted.model, exported)
    assert (exported / "mine.txt").read_text() == "kept"
    export_adapter(state, trained_run(run_config(base), 5), adapted.model, exported, overwrite=True)
    assert not (exported / "mine.txt").exists()
    assert json.loads((exported / "fedflame.json").read_text())["rounds"] == 5
    assert list(exported.parent.iterdir()) == [exported]


def test_a_folder_of_something_else_is_never_replaced(
    base: Path, adapted: AdaptedModel, state: ServerState, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("a file")
    with pytest.raises(UserError, match="not empty and no earlier export"):
        export_adapter(state, trained_run(run_config(base), 1), adapted.model, home, overwrite=True)
    with pytest.raises(UserError, match="not empty and no earlier export"):
        merge_checkpoint(state, trained_run(run_config(base), 1), K, home, overwrite=True)
    with pytest.raises(UserError, match="is a file"):
        export_adapter(
            state, trained_run(run_config(base), 1), adapted.model, tmp_path / "file", overwrite=True
        )
    assert (home / "thesis.tex").read_text() == "years of work"
    (tmp_path / "empty").mkdir()
    export_adapter(state, trained_run(run_config(base), 1), adapted.model, tmp_path / "empty")
    assert read_settings(tmp_path / "empty").adapter.r == R


@pytest.mark.parametrize("what", ["adapter", "merged"])
def test_a_full_disk_leaves_the_old_export_and_nothing_half_written(
    what: str, base: Path, adapted: AdaptedModel, state: ServerState, exported: Path
) -> None:
    before = {path.name: path.read_bytes() for path in exported.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))  # a write beyond it fails as on a full disk
    try:
        with pytest.raises(UserError, match=r"cannot write: .*nothing was changed"):
            if what == "adapter":
                export_adapter(
                    state, trained_run(run_config(base), 5), adapted.model, exported, overwrite=True
                )
            else:
                merge_checkpoint(state, trained_run(run_config(base), 5), K, exported, overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(exported.parent.iterdir()) == [exported]
    assert {path.name: path.read_bytes() for path in exported.iterdir()} == before


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(folder: Path, **changes: torch.Tensor | None) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    prefix = "base_model.model.model.layers.0.mlp.experts.5."
    for name, value in changes.items():
        tensors.pop(f"{prefix}{name}.lora_A.weight", None)
        if value is not None:
            tensors[f"{prefix}{name}.lora_A.weight"] = value
    save_file(tensors, path)


BROKEN = {
    "adapter_config.json: No such file": lambda folder: (folder / "adapter_config.json").unlink(),
    "not JSON": lambda folder: (folder / "adapter_config.json").write_text("{"),
    "holds a list; it must hold a JSON object": lambda folder: (folder / "adapter_config.json").write_text(
        "[]"
    ),
    "no LoRA adapter": lambda folder: edit_config(folder, peft_type="IA3"),
    "unlike the model, .*experts.0.down_proj": lambda folder: edit_config(folder, target_modules=["q_proj"]),
    "target_modules = '.*proj' in adapter_config.json: Input should be a valid list": lambda folder: (
        edit_config(folder, target_modules=".*proj")
    ),
    "its scale is 3; the model has 1.5": lambda folder: edit_config(folder, use_rslora=True),
    "LoRA with init_lora_weights = 'pissa' is not": lambda folder: edit_config(
        folder, init_lora_weights="pissa"
    ),
    "rank_pattern or alpha_pattern is not supported in the per-expert layout": lambda folder: edit_config(
        folder, rank_pattern={"q_proj": 2}
    ),
    "r = 'four' in adapter_config.json: Input should be a valid integer": lambda folder: edit_config(
        folder, r="four"
    ),
    "r = 8; the model is prepared for r = 4": lambda folder: edit_config(folder, r=8),
    "its scale is 4; the model has 1.5": lambda folder: edit_config(folder, lora_alpha=16),
    "adapter_model.safetensors: No such file": lambda folder: (folder / "adapter_model.safetensors").unlink(),
    "truncated or no safetensors": lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"12"),
    "lacks .*experts.5.up_proj.lora_A": lambda folder: edit_tensors(folder, up_proj=None),
    "unlike the model, .*experts.5.side_proj": lambda folder: edit_tensors(
        folder, side_proj=torch.ones(4, 32)
    ),
    r"experts.5.up_proj.lora_A.weight is \(32, 4\); .* \(4, 32\)": lambda folder: edit_tensors(
        folder, up_proj=torch.ones(32, 4)
    ),
}


@pytest.mark.parametrize("reason", list(BROKEN))
def test_a_broken_or_foreign_adapter_is_one_line(reason: str, exported: Path, adapted: AdaptedModel) -> None:
    BROKEN[reason](exported)
    with pytest.raises(UserError, match=reason) as caught:
        load_adapter(exported, adapted, seed=0)
    assert "\n" not in str(caught.value)


def test_an_adapter_for_other_attention_projections_is_refused(base: Path, exported: Path) -> None:
    with pytest.raises(UserError, match=r"has, unlike the model, .*layers\.0\.self_attn\.k_proj"):
        load_adapter(exported, adapt(base, targets=["q_proj"]), seed=0)


@pytest.mark.parametrize(
    "tensors", [{"k2": torch.ones(3)}, {"k2": torch.tensor([1.0, torch.nan])}, {"two": torch.ones(2)}]
)
def test_rescalers_that_do_not_fit_are_refused(
    tensors: dict[str, torch.Tensor], exported: Path, adapted: AdaptedModel
) -> None:
    save_file(tensors, exported / "rescalers.safetensors")
    with pytest.raises(UserError, match="no finite s for each of 2 MoE layers"):
        load_rescalers(exported, adapted)
    (exported / "rescalers.safetensors").unlink()
    assert load_rescalers(exported, adapted) == {}


def test_a_folder_that_is_no_adapter(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file or directory; no adapter folder"):
        read_settings(tmp_path)
    shutil.rmtree(tmp_path)
    with pytest.raises(UserError, match="No such file or directory; no adapter folder"):
        read_settings(tmp_path)


@pytest.mark.parametrize(("moved", "left"), [(False, "the earlier one"), (True, "the new one")])
def test_an_export_that_is_ended_while_it_replaces_another_leaves_one_of_them(
    moved: bool, left: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, rename = tmp_path / "out", Path.rename
    target.mkdir()
    (target / RUN_FILE).write_text("the earlier one")

    def interrupted(path: Path, to: Path) -> Path:
        if path.name == "new":
            if moved:
                rename(path, to)
            raise KeyboardInterrupt
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt), new_folder(target, overwrite=True) as folder:
        (folder / RUN_FILE).write_text("the new one")
    assert (target / RUN_FILE).read_text() == left
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
