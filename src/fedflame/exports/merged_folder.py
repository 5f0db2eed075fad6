"""Export a run as a stock checkpoint, with LoRA and the rescalers of one k merged into the weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from fedflame.base.files import resolve_model
from fedflame.base.loading import load_base_model
from fedflame.checked_json import write_checked
from fedflame.errors import UserError
from fedflame.exports.card import merged_card
from fedflame.exports.description import TrainedRun, run_facts
from fedflame.exports.fit import require_fit
from fedflame.exports.new_folder import RUN_FILE, checksums, new_folder, require_free
from fedflame.moe.families import MoELayer, find_moe_layers
from fedflame.moe.merged_base import merge_into
from fedflame.strategies.base import ServerState


def merge_checkpoint(state: ServerState, run: TrainedRun, k: int, to: Path, overwrite: bool = False) -> None:
    """Write a stock checkpoint that needs neither PEFT nor fedflame; its outputs equal ours at this k.

    Every weight with LoRA becomes W + c B A, with the run's scale and the adapter that is used at k. The
    rescaler s of the tier multiplies the down projections, because they are the last map before the routed
    sum. For k < K the saved config asks for k experts per token. The base is loaded in its own dtype; each
    sum is computed in float32 and rounded to that dtype once. The tokenizer is saved too, with the chat
    template that was trained.

    Args:
        state: adapter, rescalers and merged factors of the run.
        run: the base model's name, rank and scale, and the facts for the model card.
        k: the model's K, or a tier of the run.
        to: the folder to make.
        overwrite: replace an earlier export. No other folder is ever replaced.

    Raises:
        UserError: `to` is not empty, the disk is full, the base cannot be loaded or is not the run's, or k is
            no tier.
    """
    require_free(to.resolve(), overwrite)
    model, tokenizer = _load_plain_base(run.base_model)
    layers = find_moe_layers(model)
    total = state.total_at(k)
    require_fit(total, model, layers, total.rank)
    scalars = _rescaler_of(state, k, layers)
    merge_into(model, layers, total, run.adapter.scale, scalars)
    _set_active_experts(model, layers, k)
    with new_folder(to, overwrite) as folder:
        model.save_pretrained(folder)
        if run.prompt.template == "given":
            tokenizer.chat_template = run.prompt.jinja
        tokenizer.save_pretrained(folder)
        facts = {**run_facts(state, run, layers), "merged_at": k, "checksums": checksums(folder)}
        write_checked(folder / RUN_FILE, facts)
        card = merged_card(run, k, layers[0].num_experts_per_tok)
        (folder / "README.md").write_text(card, encoding="utf-8")


def _load_plain_base(name_or_path: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    try:
        dtype = AutoConfig.from_pretrained(resolve_model(name_or_path), trust_remote_code=False).dtype
    except Exception:  # of transformers, whatever is in the file; load_base_model says what is wrong
        dtype = None
    return load_base_model(name_or_path, str(dtype or torch.float32).removeprefix("torch."))


def _rescaler_of(state: ServerState, k: int, layers: Sequence[MoELayer]) -> Tensor:
    full = layers[0].num_experts_per_tok
    if k in state.rescalers:
        return state.rescalers[k]
    if k != full:
        allowed = ", ".join(str(tier) for tier in sorted({*state.rescalers, full}, reverse=True))
        raise UserError(f"merge at k = {k}: no client had this tier; allowed are {allowed}")
    return torch.ones(len(layers))


def _set_active_experts(model: PreTrainedModel, layers: Sequence[MoELayer], k: int) -> None:
    full = layers[0].num_experts_per_tok
    if k == full:
        return
    if getattr(model.config, "num_experts_per_tok", None) != full:
        raise UserError(
            f"merge at k = {k}: {model.config.model_type} has no num_experts_per_tok; allowed is {full}"
        )
    model.config.num_experts_per_tok = k
