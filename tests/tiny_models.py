"""Tiny random models and a tokenizer of single characters; every dimension has its own size."""

from __future__ import annotations

import string
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import OlmoeConfig, OlmoeForCausalLM, PreTrainedTokenizerFast

from fedflame.data.batches import Batch
from fedflame.messages import Adapter
from fedflame.moe.adapted_model import AdaptedModel

LAYERS, EXPERTS, TOP_K = 2, 6, 4
HIDDEN, WIDTH, HEADS, KEY_HEADS = 24, 20, 4, 2
KEY_WIDTH = HIDDEN // HEADS * KEY_HEADS
RANK, ALPHA = 4, 6.0
SCALING = ALPHA / RANK
PAD, END, UNKNOWN = 0, 1, 2
CHARACTERS = string.ascii_letters + string.digits + " \n.,:;?!'\"()+-*/=_%$&<>[]{}#@"
VOCABULARY = 3 + len(CHARACTERS)
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def tiny_olmoe(seed: int = 0, **overrides: Any) -> OlmoeForCausalLM:
    """A random OLMoE whose routers have clear preferences; the global generator stays as it was."""
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KEY_HEADS,
        "num_experts": EXPERTS,
        "num_experts_per_tok": TOP_K,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "pad_token_id": PAD,
        "eos_token_id": END,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return OlmoeForCausalLM(OlmoeConfig(**sizes | overrides)).eval()


def tiny_adapted(
    seed: int = 0, target_modules: tuple[str, ...] = ATTENTION, r: int = RANK, **overrides: Any
) -> AdaptedModel:
    """`tiny_olmoe` of the same seed with adapters attached, all of them zero."""
    return AdaptedModel(tiny_olmoe(seed, **overrides), r, ALPHA, target_modules)


def random_adapter(adapted: AdaptedModel, seed: int = 0, scale: float = 0.2) -> Adapter:
    """An adapter without a zero in it, B included."""
    generator = torch.Generator().manual_seed(seed)

    def draw(value: Tensor) -> Tensor:
        return scale * torch.randn(value.shape, generator=generator)

    zero = adapted.adapter()
    return Adapter(
        {name: draw(value) for name, value in zero.experts.items()},
        {name: draw(value) for name, value in zero.attention.items()},
    )


def random_batch(seed: int = 0, lengths: tuple[int, ...] = (11, 7, 4), prompt: int = 2) -> Batch:
    """Random tokens, padded on the right; labels from position `prompt` on."""
    generator = torch.Generator().manual_seed(seed)
    size = (len(lengths), max(lengths))
    input_ids = torch.randint(3, VOCABULARY, size, generator=generator)
    mask = torch.arange(size[1]) < torch.tensor(lengths).unsqueeze(1)
    labelled = mask & (torch.arange(size[1]) >= prompt)
    return Batch(input_ids.where(mask, PAD), mask.long(), input_ids.where(labelled, -100))


def with_active_experts(k: int, seed: int = 0, **overrides: Any) -> OlmoeForCausalLM:
    """The stock model of this seed, built with k in its config instead of K."""
    return tiny_olmoe(seed, num_experts_per_tok=k, **overrides)


def merged(adapted: AdaptedModel, stock: OlmoeForCausalLM) -> OlmoeForCausalLM:
    """`stock` in float64 with the low-rank products of `adapted` added into its weights, s included.

    No adapter code of the library runs in it: it is the oracle of the adapted model.
    """
    stock = stock.double()
    stock.set_experts_implementation("eager")
    weights = stock.state_dict()
    adapter, scaling = adapted.adapter(), adapted.loras[0].scaling
    for layer, s in enumerate(adapted.rescaler_values().double()):
        a1, b1, a2, b2 = (adapter.experts[f"{layer}.{bank}"].double() for bank in ("A1", "B1", "A2", "B2"))
        r, width = a2.shape[1], a2.shape[2]
        gate_up = weights[f"model.layers.{layer}.mlp.experts.gate_up_proj"]
        down = weights[f"model.layers.{layer}.mlp.experts.down_proj"]
        for expert in range(len(a1)):
            gate_up[expert, :width] += scaling * b1[expert, :width] @ a1[expert, :r]
            gate_up[expert, width:] += scaling * b1[expert, width:] @ a1[expert, r:]
            down[expert] = s * (down[expert] + scaling * b2[expert] @ a2[expert])
    for name, a in adapter.attention.items():
        if name.endswith(".A"):
            module = name.removesuffix(".A")
            weights[f"{module}.weight"] += scaling * adapter.attention[f"{module}.B"].double() @ a.double()
    return stock


def exact_token_losses(model: OlmoeForCausalLM, batch: Batch) -> Tensor:
    """Negative log-likelihood of each labelled token, row after row (transformers rounds to float32)."""
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    likelihoods = logits[:, :-1].log_softmax(-1)
    targets = batch.labels[:, 1:]
    chosen = likelihoods.gather(2, targets.clamp(min=0).unsqueeze(2)).squeeze(2)
    return -chosen[targets >= 0]


def router_logits(model: OlmoeForCausalLM, batch: Batch) -> list[Tensor]:
    """[N,E] per layer: the input of every router times its weights, padding included."""
    logits: list[Tensor] = []
    handles = [
        layer.mlp.gate.register_forward_pre_hook(
            lambda gate, inputs: logits.append(inputs[0].reshape(-1, HIDDEN) @ gate.weight.T)
        )
        for layer in model.model.layers
    ]
    with torch.no_grad():
        model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    for handle in handles:
        handle.remove()
    return logits


def forbid_expert(adapted: AdaptedModel, expert: int) -> None:
    """Make it impossible at k = 1: its router logit is the mean of two others, so never the largest."""
    for layer in adapted.layers:
        weight = layer.router.get_parameter("weight").data
        weight[expert] = (weight[expert - 1] + weight[expert - 2]) / 2


def character_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character, so that any boundary in a text is a boundary between tokens."""
    names = ["<pad>", "<end>", "<unknown>", *CHARACTERS]
    tokenizer = Tokenizer(models.WordLevel({name: index for index, name in enumerate(names)}, "<unknown>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", unk_token="<unknown>"
    )
