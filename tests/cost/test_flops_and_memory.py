"""Costs against torch's own FLOP counter, real models' parameters, and numbers by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import astuple
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.tiny_models import EXPERTS, HIDDEN, LAYERS, WIDTH, tiny_adapted
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from fedflame.config.words import Dtype
from fedflame.cost.adapter_size import adapter_parameters
from fedflame.cost.flops import forward_flops_per_token, training_flops_per_token
from fedflame.cost.memory import least_evaluation_memory, least_training_memory, training_memory
from fedflame.cost.model_shape import ModelShape, base_parameters, read_model_shape
from fedflame.cost.tiers import Tier, require_possible, tier_costs
from fedflame.errors import UserError

ROOT = Path(__file__).parents[2]
MODELS = ROOT / "configs" / "models"
OLMOE = MODELS / "OLMoE-1B-7B-0924"
QKVO = ("q_proj", "k_proj", "v_proj", "o_proj")
BATCH, LENGTH, RANK = 2, 7, 3
from_config: Any = AutoModelForCausalLM.from_config

# No two sizes of one family are equal (OLMoE alone ties its query width to the hidden size).
COMMON: dict[str, Any] = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "vocab_size": 53,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "olmoe": {"intermediate_size": 10, "num_experts": 11, "num_experts_per_tok": 8},
    "mixtral": {"intermediate_size": 10, "num_local_experts": 5, "num_experts_per_tok": 2, "head_dim": 8},
    "qwen3_moe": {
        "moe_intermediate_size": 10,
        "intermediate_size": 17,
        "num_experts": 11,
        "num_experts_per_tok": 4,
        "head_dim": 8,
        "num_hidden_layers": 4,
        "mlp_only_layers": [0],
    },
    "qwen2_moe": {
        "moe_intermediate_size": 10,
        "intermediate_size": 17,
        "shared_expert_intermediate_size": 13,
        "num_experts": 11,
        "num_experts_per_tok": 4,
        "num_hidden_layers": 4,
        "decoder_sparse_step": 2,
    },
    "deepseek_v3": {
        "moe_intermediate_size": 10,
        "intermediate_size": 17,
        "n_shared_experts": 2,
        "n_routed_experts": 12,
        "num_experts_per_tok": 4,
        "n_group": 2,
        "topk_group": 1,
        "num_key_value_heads": 6,
        "q_lora_rank": 15,
        "kv_lora_rank": 14,
        "qk_nope_head_dim": 5,
        "qk_rope_head_dim": 4,
        "v_head_dim": 8,
        "num_hidden_layers": 3,
        "first_k_dense_replace": 1,
        "num_mtp_layers": 0,
    },
}


class ExpertsWithLora(nn.Module):
    """Expert by expert, the plainest form of the method: what the counted FLOPs are held against."""

    def __init__(self, base: Any) -> None:
        super().__init__()
        (e, hidden, inner) = base.down_proj.shape
        self.base = base
        self.a1 = nn.Parameter(torch.randn(e, 2 * RANK, hidden))
        self.b1 = nn.Parameter(torch.randn(e, 2 * inner, RANK))
        self.a2 = nn.Parameter(torch.randn(e, RANK, inner))
        self.b2 = nn.Parameter(torch.randn(e, hidden, RANK))

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        rows = []
        for e in range(self.a1.shape[0]):
            token, slot = torch.where(index == e)
            h = x[token]
            z_gate, z_up = (h @ self.a1[e].T).chunk(2, dim=-1)
            b_gate, b_up = self.b1[e].chunk(2)
            gate, up = (h @ self.base.gate_up_proj[e].T).chunk(2, dim=-1)
            inner = torch.sigmoid(gate + z_gate @ b_gate.T) * (up + z_up @ b_up.T)
            out = inner @ self.base.down_proj[e].T + inner @ self.a2[e].T @ self.b2[e].T
            rows.append(torch.zeros_like(x).index_add(0, token, out * weights[token, slot, None]))
        return torch.stack(rows).sum(0)


def tiny_model(family: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **(COMMON | FAMILIES[family] | changes))
    return from_config(
        config, attn_implementation="eager", experts_implementation="eager", dtype=torch.float32
    )


def shape_of(family: str, folder: Path) -> ModelShape:
    tiny_model(family).config.save_pretrained(folder)
    return read_model_shape(folder)


def set_top_k(model: Any, k: int) -> None:
    for module in model.modules():
        if hasattr(module, "top_k") and not hasattr(module, "experts"):
            module.top_k = k


def attach(model: Any, targets: tuple[str, ...]) -> Any:
    """Expert LoRA on every expert, attention LoRA on the targets; everything else frozen."""
    model.requires_grad_(False)
    for layer in model.model.layers:
        if hasattr(layer.mlp, "experts"):
            layer.mlp.experts = ExpertsWithLora(layer.mlp.experts)
    if not targets:
        return model
    banks = [p for p in model.parameters() if p.requires_grad]
    wrapped = get_peft_model(model, LoraConfig(r=RANK, target_modules=list(targets)))
    for bank in banks:
        bank.requires_grad_(True)
    return wrapped


def counted(model: Any, backward: bool, **arguments: Any) -> int:
    """FLOPs of torch's counter for one batch, without the rotation angles (a product [d/2,1] x [1,S])."""
    tokens = torch.randint(0, 53, (BATCH, LENGTH))
    with FlopCounterMode(display=False) as counter:
        logits = model(tokens, use_cache=False, **arguments).logits
        if backward:
            logits.pow(2).sum().backward()
    total: int = counter.get_total_flops()
    by_module = counter.get_flop_counts()
    return total - sum(sum(ops.values()) for name, ops in by_module.items() if name.endswith("rotary_emb"))


@pytest.mark.parametrize("k", [1, 2, 4, 8])
def test_forward_of_olmoe_equals_torchs_counter(k: int, tmp_path: Path) -> None:
    shape = shape_of("olmoe", tmp_path)
    model = tiny_model("olmoe")
    set_top_k(model, k)
    expected = forward_flops_per_token(shape, k, 0, (), LENGTH)
    assert counted(model, backward=False) == BATCH * LENGTH * expected.total


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attention", ["none", "all", "first", "second", "third", "output"])
def test_lora_flops_equal_torchs_counter(family: str, attention: str, tmp_path: Path) -> None:
    shape = shape_of(family, tmp_path)
    names = tuple(p.name for p in shape.attention[0])
    single = {"first": names[:1], "second": names[1:2], "third": names[2:3], "output": names[-1:]}
    targets = {"none": (), "all": names, **single}[attention]
    model = attach(tiny_model(family), targets)
    set_top_k(model, 2)
    for backward, function in ((False, forward_flops_per_token), (True, training_flops_per_token)):
        assert counted(model, backward) == BATCH * LENGTH * function(shape, 2, RANK, targets, LENGTH).total


@pytest.mark.parametrize("backward", [False, True])
def test_head_runs_at_labelled_positions(backward: bool, tmp_path: Path) -> None:
    shape = shape_of("olmoe", tmp_path)
    model = attach(tiny_model("olmoe"), QKVO)
    function = training_flops_per_token if backward else forward_flops_per_token
    expected = function(shape, 8, RANK, QKVO, LENGTH, labelled_share=3 / LENGTH).total
    assert counted(model, backward, logits_to_keep=3) == pytest.approx(BATCH * LENGTH * expected, rel=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_base_parameters_are_those_of_the_model(family: str, tied: bool, tmp_path: Path) -> None:
    model = tiny_model(family, tie_word_embeddings=tied)
    model.config.save_pretrained(tmp_path)
    expected = sum(p.numel() for p in model.parameters())
    assert base_parameters(read_model_shape(tmp_path)) == expected


@pytest.mark.parametrize(
    ("name", "family"),
    [("OLMoE-1B-7B-0924", "olmoe"), ("Mixtral-8x7B", "mixtral"), ("Qwen3-30B-A3B", "qwen3_moe")],
)
def test_shipped_configs_describe_the_real_models(name: str, family: str) -> None:
    config = AutoConfig.from_pretrained(MODELS / name)
    assert config.model_type == family
    with torch.device("meta"):
        model = from_config(config)
    parameters = base_parameters(read_model_shape(MODELS / name))
    assert parameters == sum(p.numel() for p in model.parameters())
    published = {"olmoe": 6.92e9, "mixtral": 46.7e9, "qwen3_moe": 30.5e9}[family]
    assert parameters == pytest.approx(published, rel=2e-3)


def test_numbers_by_hand(tmp_path: Path) -> None:
    """One layer: H 6, I 5, 7 experts, 2 heads of 4 and one key-value head, vocabulary 11; R 2, S 3, k 2."""
    config = {
        "model_type": "mixtral",
        "hidden_size": 6,
        "intermediate_size": 5,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 4,
        "num_local_experts": 7,
        "num_experts_per_tok": 3,
        "vocab_size": 11,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    shape = read_model_shape(tmp_path / "config.json")
    # q 6x8, k 6x4, v 6x4, o 8x6 = 144 multiply-adds; scores 3*2*4 twice; router 6*7; three 6x5 matrices
    # for each of two experts; LoRA 3*2*(6+5) for each; attention LoRA on q and o 2*(6+8) each; head 6*11.
    forward = forward_flops_per_token(shape, 2, 2, ("q_proj", "o_proj"), 3)
    assert astuple(forward) == (288, 96, 84, 360, 264, 112, 0, 0, 132)
    assert forward.total == 1336
    assert forward_flops_per_token(shape, 2, 2, ("q_proj", "o_proj"), 3, head=False).total == 1336 - 132
    # Backward, layer 0: base o 2*48; d(softmax) and dq 2*24 each; router and experts once; expert LoRA
    # twice; q LoRA 2*2*(6+8+8), o LoRA 2*2*(8+6)*2; head once.
    training = training_flops_per_token(shape, 2, 2, ("q_proj", "o_proj"), 3)
    assert astuple(training) == (288 + 96, 96 + 96, 168, 720, 792, 112 + 88 + 112, 0, 0, 264)
    # Experts: 7*(A1 4x6, B1 10x2, A2 2x5, B2 6x2) = 7*66; attention: 2*(6+8)*2.
    size = adapter_parameters(shape, 2, ("q_proj", "o_proj"))
    assert (size.experts, size.attention, size.total) == (462, 56, 518)
    assert (size.bytes_down, size.bytes_up("float32")) == (4 * 519, 4 * 519 + 8 * 7)
    assert size.bytes_up("bfloat16") == 2 * 518 + 4 + 8 * 7
    # A scale for each of A1, B1, A2, B2 of 7 experts, and of A, B of q and o.
    assert size.bytes_up("int8") == 518 + 4 * (4 * 7 + 4) + 4 + 8 * 7
    # Embedding and head 11*6 each, attention 144, experts 7*90, router 42, three norms of 6.
    assert base_parameters(shape) == 132 + 144 + 630 + 42 + 18
    memory = training_memory(shape, 2, 2, ("q_proj", "o_proj"), tokens_per_step=3, dtype="bfloat16")
    # Per token: 43*6 around; 2 experts keep 2*5 + 3*2 and pass 2*6 + 3*5 values of 2 bytes; logits 11*10.
    activations = 3 * (258 + 64 + 108 + 110)
    # Room beside 7 experts, whose ranks are filled up to 8: 26 x 22 for 10 x 6, 14 x 13 for 6 x 5.
    base = 2 * (966 + 7 * (26 * 22 - 60 + 14 * 13 - 30))
    assert astuple(memory) == (base, 4 * 518, 4 * 518, 8 * 518, activations)
    setting = (shape, 2, 2, ("q_proj", "o_proj"), 3, "bfloat16", 1.0)
    # 2 bytes each: without the 2*5 of two experts before the activation; with the layer's input of 6.
    assert training_memory(*setting, "experts").activations == activations - 3 * 2 * 2 * 10
    assert training_memory(*setting, "layers").activations == activations + 3 * 2 * 6
    # For each of 3 tokens and 9 of its sequence a number of 2 bytes, and two truths.
    assert training_memory(*setting, mask_width=9).activations == activations + 3 * 9 * 4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_least_that_training_takes_is_in_the_tensors_of_the_model(
    dtype: Dtype, tiny_folder: Path
) -> None:
    adapted = tiny_adapted(r=RANK)
    banks = sum(value.numel() for value in adapted.attached().tensors().values())
    frozen = sum(value.numel() for value in adapted.model.parameters() if not value.requires_grad)
    shape, width = read_model_shape(tiny_folder), 4 if dtype == "float32" else 2
    filled = 4 if dtype == "float32" else 8  # RANK is 3
    weights = [(2 * WIDTH, HIDDEN, 2 * filled), (HIDDEN, WIDTH, filled)]
    room = LAYERS * EXPERTS * sum((out + n) * (into + n) - out * into for out, into, n in weights)
    if dtype == "float32":
        held = [part for lora in adapted.loras for part in (lora.experts.up, lora.experts.down)]
        assert sum(part.buffer.numel() - part.weight.numel() for part in held) == room
    evaluated = least_evaluation_memory(shape, RANK, QKVO, dtype)
    assert evaluated == width * (frozen + room) + 4 * banks
    trained = least_training_memory(shape, RANK, QKVO, dtype)
    assert trained == evaluated + 2 * 4 * banks + 4 * banks // LAYERS
    assert least_training_memory(shape, RANK, QKVO, dtype, True) == evaluated + 3 * 4 * banks


def test_adapter_of_olmoe_is_that_of_the_banks() -> None:
    size = adapter_parameters(read_model_shape(OLMOE), 16, QKVO)
    assert size.experts == 16 * 64 * (32 * 2048 + 2048 * 16 + 16 * 1024 + 2048 * 16) == 150_994_944
    assert size.attention == 16 * 4 * 16 * (2048 + 2048)


@pytest.mark.parametrize("model", ["OLMoE-1B-7B-0924", "Mixtral-8x7B"])
def test_halves_of_an_adapter_are_those_of_the_banks_and_together_the_whole(model: str) -> None:
    shape = read_model_shape(MODELS / model / "config.json")
    whole, a, b = (adapter_parameters(shape, 5, ("q_proj", "k_proj"), half) for half in ("both", "A", "B"))
    assert (a.experts + b.experts, a.attention + b.attention) == (whole.experts, whole.attention)
    h, inner = shape.hidden_size, shape.expert_size
    assert a.experts == shape.moe_layers * shape.num_experts * 5 * (2 * h + inner)
    assert b.experts == shape.moe_layers * shape.num_experts * 5 * (2 * inner + h)
    heads = [p.fan_out for p in shape.attention[0] if p.name in ("q_proj", "k_proj")]
    ranks = 5 * len(shape.sparse_layers)
    assert (a.attention, b.attention) == (ranks * 2 * h, ranks * sum(heads))


def test_of_halves_that_take_turns_the_larger_one_counts_up() -> None:
    shape = read_model_shape(OLMOE)
    a, b = (adapter_parameters(shape, 16, (), half) for half in ("A", "B"))
    assert a.bytes_up("float32") > b.bytes_up("float32")
    up = [
        tier_costs(shape, [Tier(8, 16, 1)], 16, (), 128, halves=halves)[0].bytes_up
        for halves in (("B",), ("B", "A"))
    ]
    assert up == [b.bytes_up("float32"), a.bytes_up("float32")]


def test_tier_costs() -> None:
    shape = read_model_shape(OLMOE)
    tiers = [Tier(8, 16, 3), Tier(2, 16, 1), Tier(1, 16, 2), Tier(8, 5, 1)]
    costs = tier_costs(shape, tiers, 16, QKVO, 128)
    assert [Tier(c.active_experts, c.rank, c.clients) for c in costs] == tiers
    assert costs[0].relative_to_full == 1.0
    for cost in costs:
        size = adapter_parameters(shape, cost.rank, QKVO)
        forward = forward_flops_per_token(shape, cost.active_experts, cost.rank, QKVO, 128).total
        training = training_flops_per_token(shape, cost.active_experts, cost.rank, QKVO, 128).total
        assert cost.bytes_down == size.bytes_down
        assert cost.forward_flops_per_token == forward
        assert cost.relative_to_full == forward / costs[0].forward_flops_per_token
        assert cost.training_flops_per_token == training
        assert cost.bytes_up - cost.bytes_down == 8 * 16 * 64


@pytest.mark.parametrize("k", [0, 9])
def test_a_tier_the_model_cannot_run_is_refused(k: int) -> None:
    shape = read_model_shape(OLMOE)
    require_possible([1, 8], shape)
    with pytest.raises(UserError) as caught:
        require_possible([8, k], shape)
    expected = f"active_experts {k}: must be between 1 and 8 (the model's num_experts_per_tok)"
    assert str(caught.value) == expected


def test_unknown_target_modules_are_refused() -> None:
    with pytest.raises(UserError, match=r"'gate_proj': .* of olmoe: q_proj, k_proj, v_proj, o_proj"):
        adapter_parameters(read_model_shape(OLMOE), 4, ("gate_proj",))


BROKEN = [
    ("{", "config.json: not JSON: "),
    ("[]", "config.json: holds a list; it must hold a JSON object"),
    ('{"model_type": "llama"}', "llama is no sparse mixture of experts: it has no num_experts, num_local_"),
    ('{"num_experts": 0}', "is no sparse mixture of experts"),
    ('{"num_experts": 4, "model_type": ["olmoe"]}', "model_type = ['olmoe']: must be a name"),
    ('{"num_experts": 4, "head_dim": "a"}', "head_dim = 'a': must be an integer from 0 to 2,147,483,647"),
    ('{"num_experts": 4, "decoder_sparse_step": -1}', "decoder_sparse_step = -1: must be an integer"),
    ('{"num_experts": 4, "mlp_only_layers": 5}', "mlp_only_layers = 5: must be a list of at most 10,000"),
    ('{"num_experts": 4, "mlp_layer_types": [[]]}', "mlp_layer_types: must be a list of at most 10,000"),
    ('{"num_experts": 4, "hidden_size": 8, "vocab_size": 9}', "lacks num_hidden_layers, num_attention_heads"),
]


@pytest.mark.parametrize(("text", "message"), BROKEN)
def test_a_config_that_cannot_be_used_is_one_line(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError) as caught:
        read_model_shape(tmp_path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts_per_tok": "8"}, "num_experts_per_tok = '8': must be a positive integer"),
        ({"hidden_size": 0}, "hidden_size = 0: must be a positive integer"),
        ({"intermediate_size": None}, "lacks intermediate_size"),
        ({"first_k_dense_replace": 16}, "no sparse mixture of experts"),
    ],
)
def test_a_value_that_cannot_be_used_is_named(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    config = json.loads((OLMOE / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        read_model_shape(tmp_path)


def test_a_missing_model_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file or folder"):
        read_model_shape(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"the folder has no config\.json"):
        read_model_shape(tmp_path)


def test_planning_imports_no_torch() -> None:
    program = (
        "import sys, fedflame.cost.run_cost; print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "False False\n"


def test_docs_quote_the_printed_table() -> None:
    script = ROOT / "benchmarks" / "flops" / "olmoe_1b_7b.py"
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True)
    assert done.stdout.count("|") > 20
    assert done.stdout in (ROOT / "docs" / "flops.md").read_text(encoding="utf-8")
