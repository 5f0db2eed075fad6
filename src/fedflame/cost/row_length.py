"""How many tokens a row may have: by the configuration, and by the model."""

from __future__ import annotations

from fedflame.cost.model_shape import ModelShape
from fedflame.errors import UserError

LONGEST_BY_DEFAULT = 1024
"""The most tokens of a row if `data.max_length` is 0, on a model whose context is not shorter."""


def row_length(max_length: int, shape: ModelShape) -> int:
    """Return the most tokens of a row.

    Args:
        max_length: `data.max_length`; 0 for as many as the rows have, up to `LONGEST_BY_DEFAULT` and the
            model's context.
        shape: the model.

    Raises:
        UserError: it is longer than the model's context.
    """
    context = shape.max_position_embeddings
    if max_length == 0:
        return min(LONGEST_BY_DEFAULT, context or LONGEST_BY_DEFAULT)
    if context is not None and max_length > context:
        raise UserError(
            f"data.max_length = {max_length}: the model's context is {context} tokens "
            "(max_position_embeddings)"
        )
    return max_length


def prompt_length(max_new_tokens: int, shape: ModelShape) -> int | None:
    """Return the most tokens of a prompt that so many are generated after; None for no limit.

    Raises:
        UserError: the model's context has no room for a prompt.
    """
    context = shape.max_position_embeddings
    if context is None:
        return None
    if max_new_tokens >= context:
        raise UserError(
            f"evaluation.max_new_tokens = {max_new_tokens}: must be below the model's context of {context} "
            "tokens (max_position_embeddings), which prompt and answer share"
        )
    return context - max_new_tokens
