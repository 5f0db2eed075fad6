"""The sum of the gradients of rows, each scaled down to a norm: one row at a time, or many by their norms.

The result is the same, up to the order in which numbers of float32 are added.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from fedflame.config.words import GHOST_TOKENS, Clipping
from fedflame.data.batches import collate
from fedflame.data.encoding import EncodedRow
from fedflame.errors import UserError
from fedflame.moe.adapted_model import AdaptedModel
from fedflame.moe.row_norms import row_norms
from fedflame.privacy.clipping import add_clipped, clip_factors
from fedflame.training.token_loss import row_losses, token_losses

Unit = Sequence[EncodedRow]
"""The rows that are clipped together: one, or those of a person."""


def trained_values(adapted: AdaptedModel) -> dict[str, nn.Parameter]:
    """Return what is trained by name: LoRA values, and learned rescalers as `{layer}.s`."""
    values: dict[str, nn.Parameter] = dict(adapted.attached().tensors())  # type: ignore[arg-type]
    values |= {f"{lora.index}.s": lora.s for lora in adapted.loras}
    return {name: value for name, value in values.items() if value.requires_grad}


def require_clippable(adapted: AdaptedModel, clipping: Clipping) -> None:
    """Raise UserError if the rows of this model cannot be clipped this way, whatever the plan.

    In float16 steps that overflow are skipped, which tells of rows. By norms, what a row adds is not rounded
    by itself: in bfloat16 the rounding of the whole sum could hide more than the noise may.
    """
    if adapted.dtype == "float16":
        raise UserError("a private run in float16 would skip steps that overflow; set model.dtype=bfloat16")
    if clipping == "row":
        return
    if adapted.dtype != "float32":
        raise UserError(
            f"privacy.clipping = 'ghost' with a base in {adapted.dtype}: its sums are rounded; set "
            "model.dtype=float32, or privacy.clipping=row"
        )
    if adapted.gradient_checkpointing == "layers":
        raise UserError(
            "privacy.clipping = 'ghost' keeps what layers would compute again; set gradient_checkpointing to "
            "experts or none, or privacy.clipping=row"
        )


def clipped_sums(
    adapted: AdaptedModel, units: Sequence[Unit], clip_norm: float, clipping: Clipping, pad_token_id: int
) -> dict[str, Tensor]:
    """Return by name, as `trained_values`, the sum of the units' gradients, each of at most this norm.

    The gradient of a unit is the mean over its rows of the gradient of a row's mean loss. Units of several
    rows are clipped one row at a time, however the others are.
    """
    trained = trained_values(adapted)
    sums = {name: torch.zeros_like(value) for name, value in trained.items()}
    together = clipping == "ghost" and all(len(unit) < 2 for unit in units)
    if together:
        for rows in _alike([row for unit in units for row in unit]):
            _add_by_norms(sums, adapted, trained, rows, clip_norm, pad_token_id)
    else:
        for unit in units:
            add_clipped(sums, _gradient(adapted, trained, unit, pad_token_id), clip_norm)
    return sums


def _gradient(
    adapted: AdaptedModel, trained: Mapping[str, nn.Parameter], unit: Unit, pad_token_id: int
) -> dict[str, Tensor]:
    gradient = {name: torch.zeros_like(value) for name, value in trained.items()}
    for row in unit:
        loss = token_losses(adapted, collate([row], pad_token_id)).mean() / len(unit)
        of_row = torch.autograd.grad(loss, list(trained.values()))
        for total, value in zip(gradient.values(), of_row, strict=True):
            total += value
    return gradient


def _alike(rows: Sequence[EncodedRow]) -> Iterator[list[EncodedRow]]:
    """Yield rows of similar length, together at most `GHOST_TOKENS` tokens, and one row at least."""
    waiting: list[EncodedRow] = []
    for row in sorted(rows, key=lambda row: len(row.ids)):
        if waiting and (len(waiting) + 1) * len(row.ids) > GHOST_TOKENS:
            yield waiting
            waiting = []
        waiting.append(row)
    if waiting:
        yield waiting


def _add_by_norms(
    sums: Mapping[str, Tensor],
    adapted: AdaptedModel,
    trained: Mapping[str, nn.Parameter],
    rows: Sequence[EncodedRow],
    clip_norm: float,
    pad_token_id: int,
) -> None:
    batch = collate(rows, pad_token_id)
    adapted.counts.begin_step(batch.on(adapted.device).real_tokens)
    try:
        with row_norms(adapted, batch.attention_mask) as norms:
            loss = row_losses(adapted, batch).sum()
            torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    finally:
        adapted.counts.abandon_step()
    factors = clip_factors(norms.squares.sqrt(), clip_norm)
    adds = (factors > 0).tolist()
    if not all(adds):  # zero times what is not finite would not be zero
        finite = [row for row, some in zip(rows, adds, strict=True) if some]
        if finite:
            _add_by_norms(sums, adapted, trained, finite, clip_norm, pad_token_id)
        return
    found = norms.sums(factors)
    for name, value in trained.items():
        sums[name] += found[value]
