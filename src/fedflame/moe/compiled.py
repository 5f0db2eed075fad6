"""One source for CPU and GPU: what runs eagerly on a CPU runs compiled on CUDA, where a compiler is there.

Everything that is compiled must be right uncompiled, too: a machine may lack a compiler, and torch runs a
function eagerly once it has compiled it for too many kinds of arguments.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, wraps
from importlib.util import find_spec
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch._functorch import config as functorch
from torch.utils._pytree import tree_leaves

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

OPTIONS: dict[str, Any] = {
    "comprehensive_padding": False,
    "assert_indirect_indexing": False,
    "max_pointwise_cat_inputs": 0,
    "max_complex_pointwise_cat_inputs": 0,
}
"""Rows stay as wide as they are, so that operators can write into them. Indices are not checked. What lies
side by side is computed into its place, not all of it for every place."""
BUDGET = 0.3
"""Of the activations that compiled layers would keep, the share that they may keep to save memory; what is
left out is computed again."""
VARIANTS = 64
"""Most kinds of arguments that a layer is compiled for: each k is one, and a batch of one row another."""


def compiled_on_cuda(
    varying: int,
) -> Callable[[Callable[Parameters, Result]], Callable[Parameters, Result]]:
    """Compile a function of tensors where the first of them lies on CUDA.

    The first `varying` arguments are tensors, or sequences of them, of any length in the first dimension. All
    other sizes are constants of the compiled program: kernels that divide by unknown widths take several
    times as long.
    """

    def decorate(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
        @wraps(function)
        def chosen(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
            device = next(value.device for value in args if isinstance(value, Tensor))
            if not can_compile(device.type):
                return function(*args, **kwargs)
            run = _compiled(function)
            for value in tree_leaves(args[:varying]):
                if value is not None:
                    torch._dynamo.maybe_mark_dynamic(value, 0)
            result: Result = run(*args, **kwargs)
            return result

        return chosen

    return decorate


def can_compile(device_type: str) -> bool:
    """Whether torch.compile makes kernels for this kind of device here."""
    return device_type == "cuda" and _has_compiler()


@cache
def _has_compiler() -> bool:
    """Whether Triton is there, and a C compiler, with which Triton builds what starts its kernels."""
    compilers = (os.environ.get("CC", "cc"), "gcc", "clang")
    return find_spec("triton") is not None and any(map(shutil.which, compilers))


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    from torch._inductor import config as inductor  # here, because a CPU needs no second for it

    known = {name: value for name, value in OPTIONS.items() if hasattr(inductor, name)}
    compiled: Callable[..., Any] = torch.compile(function, dynamic=False, options=known)
    return compiled


class CompiledLayers:
    """The decoder layers of a model, compiled around what is kept out of their graphs.

    Nothing is compiled before a layer runs within `used`.
    """

    def __init__(self, layers: Sequence[nn.Module], save_memory: bool) -> None:
        self._budget = BUDGET if save_memory else 1.0
        self._forwards = [(layer, torch.compile(layer.forward, dynamic=True)) for layer in layers]

    @contextmanager
    def used(self) -> Iterator[None]:
        """Run the layers compiled within the block."""
        for layer, forward in self._forwards:
            layer.forward = forward
        try:
            with (
                torch._dynamo.config.patch(recompile_limit=VARIANTS),
                functorch.patch(activation_memory_budget=self._budget),
            ):
                yield
        finally:
            for layer, _ in self._forwards:
                del layer.forward
