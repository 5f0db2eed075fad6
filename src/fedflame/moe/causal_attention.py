"""Causal attention within rows, whether a sequence is one row, padded on the right, or has several.

Where a sequence is one row, no mask is made unless it is needed. A token never looks at what stands to its
right, so padding there changes no token that counts. transformers would ask the padding mask whether it is
all ones, which waits for a GPU, and would then make a mask, which keeps attention from its fastest kernels.

Where rows lie end to end in a sequence, a mask keeps each token within its row. It is made of transformers'
own mask for the layer, so that a window stays a window: two tokens of a row are as far from each other in
the sequence as they are in the row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from functools import partial
from typing import Any

from torch import Tensor
from transformers import AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import (
    and_masks,
    causal_mask_function,
    eager_mask,
    packed_sequence_mask_function,
    sdpa_mask,
)

from fedflame.cost.refused_families import require_packable


@contextmanager
def right_padded(model: PreTrainedModel) -> Iterator[None]:
    """Tell the attention of the model that every sequence within the block is one row, padded on the right.

    Models that attend otherwise than by sdpa, such as those with attention sinks, keep what they have.
    """
    sdpa = model.config.get_text_config()._attn_implementation == "sdpa"
    with _masks_made(_unless_needed) if sdpa else nullcontext():
        yield


@contextmanager
def packed(model: PreTrainedModel, position_ids: Tensor) -> Iterator[None]:
    """Keep the attention of the model within rows in the block, whose sequences have several.

    Nothing waits for a GPU here. transformers would find rows by their positions, too, but would ask the
    device whether there are several.

    Args:
        model: it attends by sdpa, or eagerly.
        position_ids: [batch, sequence] the position of every token in its row; a row begins at each 0, and
            each token of padding is one.

    Raises:
        UserError: rows of the model's family cannot share a sequence.
    """
    require_packable(model.config.get_text_config().model_type)
    with _masks_made(partial(_within_rows, (position_ids == 0).cumsum(1))):
        yield


MakeMask = Callable[..., Tensor | None]
_MAKE: ContextVar[MakeMask | None] = ContextVar("how masks are made", default=None)
"""What makes masks in this thread; None for transformers itself. Another thread may train another model."""


@contextmanager
def _masks_made(make: MakeMask) -> Iterator[None]:
    """Let masks be made by `make` within the block.

    The model's way to attend keeps its name: some families ask for it by name before they choose keys.
    """
    token = _MAKE.set(make)
    try:
        yield
    finally:
        _MAKE.reset(token)


def _made(own: MakeMask, **asked: Any) -> Tensor | None:
    return (_MAKE.get() or own)(**asked)


def _unless_needed(
    *, kv_length: int, local_size: int | None = None, allow_is_causal_skip: bool = True, **rest: Any
) -> Tensor | None:
    """Return no mask for plain causal attention, and transformers' own for windows and all else."""
    within = local_size is None or kv_length < local_size
    if allow_is_causal_skip and within:
        return None
    mask: Tensor | None = sdpa_mask(
        kv_length=kv_length, local_size=local_size, allow_is_causal_skip=False, **rest
    )
    return mask


def _within_rows(
    rows: Tensor, *, mask_function: Callable[..., Any] = causal_mask_function, **rest: Any
) -> Tensor:
    """Return the mask of a layer within rows, as numbers that are added to the scores.

    torch would make such numbers of a boolean mask in every layer, and keep them all for the backward.
    Padding is not masked: it is rows of one token, which see themselves, so that no token sees nothing.
    """
    within = and_masks(mask_function, packed_sequence_mask_function(rows))
    mask: Tensor = eager_mask(mask_function=within, **rest | {"attention_mask": None})
    return mask


AttentionMaskInterface.register("sdpa", partial(_made, sdpa_mask))
AttentionMaskInterface.register("eager", partial(_made, eager_mask))
