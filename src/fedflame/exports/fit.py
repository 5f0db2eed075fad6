"""Check that a run's adapter fits a base model, whose folder or hub id may have changed since the run."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from fedflame.errors import UserError
from fedflame.messages import Adapter
from fedflame.moe.families import MoELayer

Shape = tuple[int, ...]


def require_fit(adapter: Adapter, model: nn.Module, layers: Sequence[MoELayer], r: int) -> None:
    """Check that experts and projections of the model have the number and the shapes of the adapter's.

    Raises:
        UserError: they differ. The message names the first value that does not fit.
    """
    wanted: dict[str, Shape] = {
        f"{index}.{name}": shape
        for index, layer in enumerate(layers)
        for name, shape in layer.bank_shapes(r).items()
    }
    modules = dict(model.named_modules())
    for name in adapter.attention:
        module, _, letter = name.rpartition(".")
        weight = getattr(modules.get(module), "weight", None)
        if weight is not None:
            wanted[name] = (r, weight.shape[1]) if letter == "A" else (weight.shape[0], r)
    values = {**adapter.experts, **adapter.attention}
    for name in sorted(wanted.keys() | values.keys()):
        got = tuple(values[name].shape) if name in values else None
        if got != wanted.get(name):
            needs = wanted.get(name, "nothing")
            raise UserError(f"the base model is not the run's: {name} is {got}; the model needs {needs}")
