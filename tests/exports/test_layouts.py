"""Both of PEFT's layouts of expert LoRA, written for PEFT and read from PEFT, on four families."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tests.families import tiny as tiny_family
from tests.tiny_exports import (
    ALPHA,
    MODELS,
    SIZES,
    K,
    R,
    adapt,
    assert_same_logits,
    load,
    logits,
    our_logits,
    peft_logits,
    random_state,
    run_config,
    save_base,
)
from torch import Tensor
from transformers import OlmoeConfig, OlmoeForCausalLM

from fedflame.config.load import load_config
from fedflame.errors import UserError
from fedflame.experiment.adapter_folder import trained_run
from fedflame.exports import (
    Layout,
    NoPeftLayoutError,
    export_adapter,
    load_adapter,
    load_rescalers,
    read_settings,
)
from fedflame.messages import Adapter
from fedflame.moe.adapted_model import AdaptedModel
from fedflame.strategies.base import ServerState

LAYOUTS: dict[str, tuple[Layout, ...]] = {
    "mixtral": ("per-expert", "fused"),
    "olmoe": ("per-expert", "fused"),
    "qwen2_moe": ("fused",),
    "qwen3_moe": ("per-expert", "fused"),
}
CASES = [(kind, layout) for kind, layouts in LAYOUTS.items() for layout in layouts]
FUSED = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
EXPERTS = "base_model.model.model.layers.1.mlp.experts"


@dataclass(frozen=True)
class Export:
    base: Path
    adapted: AdaptedModel
    state: ServerState
    folders: dict[Layout, Path]


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Export]:
    found = {}
    for kind, layouts in LAYOUTS.items():
        work = tmp_path_factory.mktemp(kind)
        base = save_base(kind, work / "base")
        adapted = adapt(base)
        state = random_state(adapted)
        folders = {layout: work / layout for layout in layouts}
        for layout, folder in folders.items():
            export_adapter(state, trained_run(run_config(base), 1), adapted.model, folder, layout=layout)
        found[kind] = Export(base, adapted, state, folders)
    return found


@pytest.fixture(scope="module")
def in_peft(
    exports: dict[str, Export], tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], tuple[Tensor, Tensor]]:
    jobs = [(exports[kind].base, exports[kind].folders[layout]) for kind, layout in CASES]
    return dict(zip(CASES, peft_logits(jobs), strict=True))


def assert_same_bits(one: Adapter, other: Adapter) -> None:
    assert one.tensors().keys() == other.tensors().keys()
    for name, value in one.tensors().items():
        assert torch.equal(other.tensors()[name], value), name


@pytest.mark.parametrize(("kind", "layout"), CASES)
def test_peft_in_a_fresh_process_gives_our_logits(
    kind: str,
    layout: Layout,
    exports: dict[str, Export],
    in_peft: dict[tuple[str, str], tuple[Tensor, Tensor]],
) -> None:
    plain, peft = in_peft[kind, layout]
    ours = our_logits(exports[kind].adapted, exports[kind].state, K)
    assert_same_logits(peft, ours)
    assert float((plain - ours).abs().max()) > 0.1 * float(ours.abs().max())


@pytest.mark.parametrize(("kind", "layout"), CASES)
def test_import_of_an_export_has_the_same_bits(kind: str, layout: Layout, exports: dict[str, Export]) -> None:
    export, folder = exports[kind], exports[kind].folders[layout]
    assert read_settings(folder).adapter == run_config(export.base).adapter
    assert_same_bits(export.state.adapter, load_adapter(folder, export.adapted, seed=0))
    assert {k: s.tolist() for k, s in load_rescalers(folder, export.adapted).items()} == {
        k: s.tolist() for k, s in export.state.rescalers.items()
    }


@pytest.mark.parametrize("kind", list(LAYOUTS))
def test_the_default_is_per_expert_where_peft_reads_it(
    kind: str, exports: dict[str, Export], tmp_path: Path
) -> None:
    export = exports[kind]
    with torch.device("meta"):
        hollow = MODELS[kind]()
    written = export_adapter(export.state, trained_run(run_config(export.base), 1), hollow, tmp_path / "a")
    assert written == LAYOUTS[kind][0]
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (export.folders[written] / name).read_bytes()


def test_a_layout_that_peft_does_not_read_is_refused(exports: dict[str, Export], tmp_path: Path) -> None:
    export = exports["qwen2_moe"]
    with pytest.raises(
        NoPeftLayoutError, match="no per-expert adapter for qwen2_moe models; use --layout fused"
    ):
        export_adapter(
            export.state,
            trained_run(run_config(export.base), 1),
            export.adapted.model,
            tmp_path / "a",
            layout="per-expert",
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "family, reason",
    [
        ("gpt_oss", "transposed weights and interleaved gate and up rows"),
        ("aria_text", "transposed weights"),
        ("nemotron_h", "no gate"),
    ],
)
@pytest.mark.parametrize("layout", [None, "per-expert", "fused"])
def test_experts_that_are_stored_another_way_have_no_adapter_folder(
    family: str, reason: str, layout: Layout | None, tmp_path: Path
) -> None:
    adapted = AdaptedModel(tiny_family(family), 4, 8.0, [])
    state = ServerState(adapted.initial_adapter(0), {1: torch.ones(len(adapted.layers))})
    config = load_config(None, ["adapter.r=4", "adapter.lora_alpha=8", "adapter.target_modules="])
    with pytest.raises(NoPeftLayoutError, match=f"which has {reason}; use --merge"):
        export_adapter(state, trained_run(config, 1), adapted.model, tmp_path / "a", layout=layout)
    with pytest.raises(NoPeftLayoutError, match=f"which has {reason}; use --merge"):
        load_adapter(tmp_path / "a", adapted, seed=0)
    assert not list(tmp_path.iterdir())


def test_the_names_and_values_of_one_fused_expert(exports: dict[str, Export]) -> None:
    export = exports["olmoe"]
    tensors, bank = (
        load_file(export.folders["fused"] / "adapter_model.safetensors"),
        export.state.adapter.experts,
    )
    assert len(tensors) == 2 * (2 * 2 + 4 * 2)
    e, width = 4, 20
    a = tensors[f"{EXPERTS}.base_layer.lora_A.weight"]
    assert torch.equal(a[e * 2 * R : (e + 1) * 2 * R], bank["1.A1"][e])
    b = tensors[f"{EXPERTS}.base_layer.lora_B.weight"][:, e::6]
    assert torch.equal(b[:width, :R], bank["1.B1"][e, :width])
    assert torch.equal(b[width:, R:], bank["1.B1"][e, width:])
    assert not b[:width, R:].any() and not b[width:, :R].any()
    assert torch.equal(tensors[f"{EXPERTS}.lora_A.weight"][e * R : (e + 1) * R], bank["1.A2"][e])
    assert torch.equal(tensors[f"{EXPERTS}.lora_B.weight"][:, e::6], bank["1.B2"][e])


def test_the_hubs_names_of_a_mixtral_expert(exports: dict[str, Export]) -> None:
    export = exports["mixtral"]
    tensors = load_file(export.folders["per-expert"] / "adapter_model.safetensors")
    prefix, bank = "base_model.model.model.layers.1.block_sparse_moe.experts.4.", export.state.adapter.experts
    assert torch.equal(tensors[f"{prefix}w1.lora_A.weight"], bank["1.A1"][4, :R])
    assert torch.equal(tensors[f"{prefix}w3.lora_B.weight"], bank["1.B1"][4, 20:])
    assert torch.equal(tensors[f"{prefix}w2.lora_B.weight"], bank["1.B2"][4])


@pytest.mark.parametrize("kind", [kind for kind, layouts in LAYOUTS.items() if "per-expert" in layouts])
def test_peft_saves_our_per_expert_adapter_as_our_fused_one(
    kind: str, exports: dict[str, Export], tmp_path: Path
) -> None:
    export = exports[kind]
    PeftModel.from_pretrained(load(export.base), export.folders["per-expert"]).save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    ours = load_file(export.folders["fused"] / "adapter_model.safetensors")
    assert saved.keys() == ours.keys()
    assert all(torch.equal(saved[name], ours[name]) for name in saved)
    settings, written = (
        json.loads((folder / "adapter_config.json").read_text())
        for folder in (tmp_path, export.folders["fused"])
    )
    assert all(settings[key] == written[key] for key in ("r", "lora_alpha", "rank_pattern", "alpha_pattern"))
    assert read_settings(tmp_path).adapter.r == R
    assert_same_bits(export.state.adapter, load_adapter(tmp_path, export.adapted, seed=0))


def train_in_peft(base: Path, folder: Path, seed: int = 0, **settings: object) -> Tensor:
    """The logits of a PEFT adapter with random values, and the folder that PEFT writes."""
    torch.manual_seed(seed)
    settings = {"r": 5, "lora_alpha": 7, "target_modules": ["q_proj", "v_proj"], **settings}
    model = get_peft_model(load(base), LoraConfig(task_type="CAUSAL_LM", **settings))  # type: ignore[arg-type]
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return logits(model.eval())


def in_ours(base: Path, folder: Path) -> tuple[AdaptedModel, Tensor]:
    settings = read_settings(folder)
    assert settings.base_model == str(base)
    lora = settings.adapter
    adapted = adapt(base, lora.r, lora.lora_alpha, lora.target_modules, lora.use_rslora)
    state = ServerState(load_adapter(folder, adapted, seed=3), {K: torch.ones(2)})
    return adapted, our_logits(adapted, state, K)


FOREIGN: dict[str, tuple[int, dict[str, object]]] = {
    "gate and up share one rank": (5, {"target_parameters": FUSED}),
    "short names": (5, {"target_parameters": ["gate_up_proj", "down_proj"]}),
    "gate and up only": (5, {"target_parameters": FUSED[:1]}),
    "down only": (5, {"target_parameters": FUSED[1:]}),
    "down in one layer": (5, {"target_parameters": ["gate_up_proj", "layers.1.mlp.experts.down_proj"]}),
    "experts only": (5, {"target_modules": [], "target_parameters": FUSED}),
    "attention only": (5, {}),
    "rsLoRA": (5, {"target_parameters": FUSED, "use_rslora": True}),
    "rsLoRA of attention": (5, {"use_rslora": True}),
    "rsLoRA with more rank for down": (
        7,
        {"target_parameters": FUSED, "rank_pattern": {r".*\.down_proj": 7}, "use_rslora": True},
    ),
    "alpha of one": (5, {"target_parameters": FUSED, "alpha_pattern": {r".*\.down_proj": 20, "q_proj": 3}}),
    "more rank for down": (7, {"target_parameters": FUSED, "rank_pattern": {r".*\.down_proj": 7}}),
    "less rank for queries": (5, {"target_parameters": FUSED, "rank_pattern": {"q_proj": 2}}),
    "twice the rank, shared": (
        10,
        {
            "target_parameters": FUSED,
            "rank_pattern": {"gate_up_proj": 10},
            "alpha_pattern": {"gate_up_proj": 14},
        },
    ),
}


@pytest.mark.parametrize("kind", ["olmoe", "qwen2_moe"])
@pytest.mark.parametrize("what", list(FOREIGN))
def test_an_adapter_that_peft_trained_gives_its_logits(
    kind: str, what: str, exports: dict[str, Export], tmp_path: Path
) -> None:
    base, (r, settings) = exports[kind].base, FOREIGN[what]
    theirs = train_in_peft(base, tmp_path, **settings)
    adapted, ours = in_ours(base, tmp_path)
    assert adapted.r == r
    assert_same_logits(ours, theirs)
    assert float((logits(load(base)) - ours).abs().max()) > 0.05 * float(ours.abs().max())


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_mixtral_from_peft(seed: int, exports: dict[str, Export], tmp_path: Path) -> None:
    theirs = train_in_peft(exports["mixtral"].base, tmp_path, seed, target_parameters=FUSED)
    assert_same_logits(in_ours(exports["mixtral"].base, tmp_path)[1], theirs)


def test_an_adapter_that_peft_trained_on_after_ours(exports: dict[str, Export], tmp_path: Path) -> None:
    export = exports["olmoe"]
    model = PeftModel.from_pretrained(load(export.base), export.folders["per-expert"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter += 0.1  # gate and up now share every rank
    model.save_pretrained(tmp_path)
    adapted, ours = in_ours(export.base, tmp_path)
    assert (adapted.r, adapted.loras[0].scaling) == (2 * R, ALPHA / R)
    assert_same_logits(ours, logits(model))


def test_what_a_folder_lacks_starts_as_a_new_run(exports: dict[str, Export], tmp_path: Path) -> None:
    train_in_peft(exports["olmoe"].base, tmp_path, r=R, lora_alpha=ALPHA, target_parameters=FUSED[1:])
    adapted = exports["olmoe"].adapted
    got, start = load_adapter(tmp_path, adapted, seed=3).tensors(), adapted.initial_adapter(3).tensors()
    trained = {name for name in got if ".A2" in name or ".B2" in name or "q_proj" in name or "v_proj" in name}
    assert len(trained) == 2 * 2 + 2 * 4
    for name, value in got.items():
        assert torch.equal(value, start[name]) != (name in trained), name


def test_ranks_beyond_those_of_a_product_can_be_trained(exports: dict[str, Export], tmp_path: Path) -> None:
    settings = {"target_parameters": FUSED, "rank_pattern": {r".*\.down_proj": 7}}
    train_in_peft(exports["olmoe"].base, tmp_path, **settings)
    adapted = in_ours(exports["olmoe"].base, tmp_path)[0]
    bank = adapted.adapter().experts
    assert not bank["0.B1"][:, :, 5:].any()
    assert bool((bank["0.A1"].unflatten(1, (2, 7))[:, :, 5:] != 0).all())  # with A = B = 0 no gradient moves


def edit(folder: Path, **changes: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def replace_tensor(folder: Path, name: str, value: Tensor | None) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors.pop(f"{EXPERTS}.{name}", None)
    if value is not None:
        tensors[f"{EXPERTS}.{name}"] = value
    save_file(tensors, path)


BROKEN = {
    r"base_layer.lora_A.weight is \(30, 32\); the model needs \(24, 32\)": lambda folder: edit(
        folder, rank_pattern={"down_proj": 5, "gate_up_proj": 4}
    ),
    "lacks .*layers.1.mlp.experts.lora_B.weight": lambda folder: replace_tensor(
        folder, "lora_B.weight", None
    ),
    "has, unlike the model, .*experts.9.lora_A": lambda folder: replace_tensor(
        folder, "9.lora_A.weight", torch.ones(5, 32)
    ),
    r"experts.lora_B.weight is \(6, 5, 32\); the model needs \(32, 30\)": lambda folder: replace_tensor(
        folder, "lora_B.weight", torch.ones(6, 5, 32)
    ),
    r"base_layer.lora_B.weight is \(7,\); the model needs \(40, 30\)": lambda folder: replace_tensor(
        folder, "base_layer.lora_B.weight", torch.ones(7)
    ),
    "experts.lora_A.weight has a value that is not finite": lambda folder: replace_tensor(
        folder, "lora_A.weight", torch.full((30, 20), torch.nan)
    ),
    "truncated or no safetensors": lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"12"),
    "rank_pattern = {'down_proj': 0} in adapter_config.json": lambda folder: edit(
        folder, rank_pattern={"down_proj": 0}
    ),
    "use_dora is not supported": lambda folder: edit(folder, use_dora=True),
    "has, unlike the model, .*base_layer.lora_A.weight": lambda folder: edit(
        folder, target_parameters=["mlp.experts.down_proj"]
    ),
}


@pytest.mark.parametrize("reason", list(BROKEN))
def test_a_broken_fused_adapter_is_one_line(reason: str, exports: dict[str, Export], tmp_path: Path) -> None:
    base = exports["olmoe"].base
    train_in_peft(base, tmp_path, target_parameters=FUSED)
    adapted = adapt(base, 5, 7.0)
    BROKEN[reason](tmp_path)
    with pytest.raises(UserError, match=reason) as caught:
        load_adapter(tmp_path, adapted, seed=0)
    assert "\n" not in str(caught.value)


OTHER_SIZES = {
    "intermediate_size": (24, r"experts.*lora_B.weight is \(.*\); the model needs \((48|24), "),
    "num_hidden_layers": (3, r"lacks .*layers\.2\."),
    "num_experts": (5, r"experts.5.*|is \(48, 32\); the model needs \(40, 32\)"),
}


@pytest.mark.parametrize("layout", LAYOUTS["olmoe"])
@pytest.mark.parametrize("size", list(OTHER_SIZES))
def test_an_adapter_of_another_model_is_refused(
    size: str, layout: Layout, exports: dict[str, Export], tmp_path: Path
) -> None:
    value, reason = OTHER_SIZES[size]
    other = OlmoeForCausalLM(OlmoeConfig(**{"intermediate_size": 20, **SIZES, size: value}))
    adapted = AdaptedModel(other, R, ALPHA, ("q_proj", "k_proj", "v_proj", "o_proj"))
    with pytest.raises(UserError, match=reason) as caught:
        load_adapter(exports["olmoe"].folders[layout], adapted, seed=0)
    assert "\n" not in str(caught.value)


def test_an_adapter_of_another_rank_is_refused(exports: dict[str, Export]) -> None:
    with pytest.raises(UserError, match=r"r = 4; the model is prepared for r = 5"):
        load_adapter(exports["olmoe"].folders["fused"], adapt(exports["olmoe"].base, 5), seed=0)


@pytest.mark.parametrize("kind", list(LAYOUTS))
def test_the_tokens_reach_every_expert_of_every_layer(kind: str, exports: dict[str, Export]) -> None:
    adapted, chosen = exports[kind].adapted, []
    for layer in adapted.layers:
        layer.router.register_forward_hook(
            lambda _, __, output: chosen.append(set(output[2].flatten().tolist()))
        )
    our_logits(adapted, exports[kind].state, K)
    assert chosen == [set(range(6))] * 2
