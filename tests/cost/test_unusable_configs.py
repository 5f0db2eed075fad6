"""Models and tiers that cannot be planned for: one line that says what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.cost.shipped_configs import OLMOE

from fedflame.cost.adapter_size import adapter_parameters
from fedflame.cost.model_shape import read_model_shape
from fedflame.cost.tiers import require_possible
from fedflame.errors import UserError


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
