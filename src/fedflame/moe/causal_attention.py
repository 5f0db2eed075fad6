"""Causal attention over rows that are padded on the right: no mask is made where none is needed.

A token never looks at what stands to its right, so padding there changes no token that counts. transformers
would ask the padding mask whether it is all ones, which waits for a GPU, and would then make a mask, which
keeps attention from its fastest kernels.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

REPLACED, REPLACEMENT = "sdpa", "fedflame_right_padded"
"""Models that attend otherwise, by a kernel of their own or because of attention sinks, keep what they
have."""


@contextmanager
def right_padded(model: PreTrainedModel) -> Iterator[None]:
    """Tell the attention of the model that all rows within the block are padded on the right."""
    config = model.config.get_text_config()
    if config._attn_implementation != REPLACED:
        yield
        return
    config._attn_implementation = REPLACEMENT
    try:
        yield
    finally:
        config._attn_implementation = REPLACED


def _mask(
    *, kv_length: int, local_size: int | None = None, allow_is_causal_skip: bool = True, **rest: Any
) -> Tensor | None:
    """Return no mask for plain causal attention, and transformers' own for windows and all else."""
    within = local_size is None or kv_length < local_size
    if allow_is_causal_skip and within:
        return None
    return sdpa_mask(kv_length=kv_length, local_size=local_size, allow_is_causal_skip=False, **rest)


AttentionInterface.register(REPLACEMENT, sdpa_attention_forward)
AttentionMaskInterface.register(REPLACEMENT, _mask)
