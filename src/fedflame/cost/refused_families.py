"""What mixtures of experts in transformers cannot be trained with here, or not at all, by model_type."""

from __future__ import annotations

from fedflame.errors import UserError

_NO_CAUSAL_LM = "AutoModelForCausalLM does not know it"
REFUSED_FAMILIES = {
    "dbrx": "its experts share flat matrices, outside transformers' experts interface",
    "deepseek_ocr2": _NO_CAUSAL_LM,
    "deepseek_v4": "its first routers look experts up by token id, always K of them",
    "diffusion_gemma": _NO_CAUSAL_LM,
    "doge": "its experts are rows of an embedding, outside transformers' experts interface",
    "ernie4_5_vl_moe": _NO_CAUSAL_LM,
    "glm4v_moe": _NO_CAUSAL_LM,
    "glm5_next": _NO_CAUSAL_LM,
    "hy_v4_vl": _NO_CAUSAL_LM,
    "inkling2_loop_text": "some of its layers run several times, and only their first run would be counted",
    "jetmoe": "its attention is a mixture of experts, too, and outside transformers' experts interface",
    "llama4": "routing weights multiply the experts' inputs, outside transformers' experts interface",
    "llama4_text": "routing weights multiply the experts' inputs, outside transformers' experts interface",
    "longcat_flash": "some of its experts only copy, outside transformers' experts interface",
    "mistral4": _NO_CAUSAL_LM,
    "mistral_large4": _NO_CAUSAL_LM,
    "muse_spark": f"it has a norm after each expert, and {_NO_CAUSAL_LM}",
    "nllb-moe": "it is an encoder-decoder",
    "openai_privacy_filter": _NO_CAUSAL_LM,
    "phimoe": "its router picks two experts whatever its top_k says",
    "qwen3_omni_moe": _NO_CAUSAL_LM,
    "qwen3_vl_moe": _NO_CAUSAL_LM,
    "step3p7": "its experts are outside transformers' experts interface",
    "switch_transformers": "it is an encoder-decoder",
    "unlimited_ocr": _NO_CAUSAL_LM,
    "zaya": "it runs one expert per token, and tokens that skip it would be counted for expert 0",
}
"""model_type -> why it cannot be trained."""
_STATE = "its recurrent or convolutional layers carry a state from one row to the next"
NOT_PACKABLE = dict.fromkeys(
    (
        "bailing_hybrid",
        "granitemoehybrid",
        "inkling2_text",
        "inkling_text",
        "jamba",
        "kimi_linear",
        "lara_mini",
        "lfm2_moe",
        "minimax",
        "nemotron_h",
        "qwen3_5_moe_text",
        "qwen3_next",
        "qwen4_exp_text",
    ),
    _STATE,
) | {"minimax_m3_vl_text": "its sparse layers choose blocks of keys by their place in the sequence"}
"""model_type -> why rows cannot share a sequence: a row would change what another row computes."""

BALANCED = frozenset(
    "ernie4_5_moe flex_olmo flint gpt_oss granitemoe granitemoe_swa granitemoehybrid granitemoeshared jamba "
    "laguna lara_mini mellum minimax minimax_m2 minimax_m3_vl_text mixtral olmoe qwen2_moe qwen3_5_moe_text "
    "qwen3_moe qwen3_next qwen4_exp_text".split()
)
"""The families whose model in transformers has a load-balancing loss."""


def refusal(model_type: str) -> str | None:
    """Return why a family is refused, in one line; None if it is not in the list."""
    reason = REFUSED_FAMILIES.get(model_type)
    return reason and f"{model_type} is not supported: {reason}"


def require_packable(model_type: str) -> None:
    """Raise UserError if rows of a family cannot share a sequence."""
    if reason := NOT_PACKABLE.get(model_type):
        raise UserError(
            f"{model_type} cannot be trained with training.packing or training.padding_free: {reason}; "
            "leave both false"
        )


def require_balanced(model_type: str) -> None:
    """Raise UserError if transformers has no load-balancing loss for the routers of a family."""
    if model_type not in BALANCED:
        raise UserError(
            f"{model_type} cannot be trained with training.router_aux_loss_coef: transformers has no "
            "load-balancing loss for its routers; leave it 0"
        )


def require_trainable(model_type: str, packs: bool, router_aux_loss_coef: float) -> None:
    """Raise UserError if a family cannot be trained with rows that share a sequence, or balanced routers."""
    if packs:
        require_packable(model_type)
    if router_aux_loss_coef:
        require_balanced(model_type)
