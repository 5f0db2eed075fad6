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
from torch._dynamo import maybe_mark_dynamic

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

OPTIONS: dict[str, Any] = {"comprehensive_padding": False, "assert_indirect_indexing": False}
"""Rows stay as wide as they are, so that operators can write into them. Indices are not checked."""
VARIANTS = 64
"""Most kinds of arguments that a layer is compiled for: each k is one, and a batch of one row another."""


def compiled_on_cuda(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Compile a function of tensors where the first of them lies on CUDA.

    The tensors that `of_any_length` has marked may have any length in the first dimension. All other sizes
    are constants of the compiled program: kernels that divide by unknown widths take several times as long.
    """

    @wraps(function)
    def chosen(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        device = next(value.device for value in args if isinstance(value, Tensor))
        run = _compiled(function) if can_compile(device.type) else function
        return run(*args, **kwargs)

    return chosen


def of_any_length(*tensors: Tensor) -> None:
    """Let a compiled function take these tensors with any length in the first dimension."""
    for tensor in tensors:
        maybe_mark_dynamic(tensor, 0)


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
    compiled: Callable[..., Any] = torch.compile(function, dynamic=False, options=OPTIONS)
    return compiled


class CompiledLayers:
    """The decoder layers of a model, compiled around what is kept out of their graphs.

    Nothing is compiled before a layer runs within `used`.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self._forwards = [(layer, torch.compile(layer.forward, dynamic=True)) for layer in layers]

    @contextmanager
    def used(self) -> Iterator[None]:
        """Run the layers compiled within the block."""
        for layer, forward in self._forwards:
            layer.forward = forward
        try:
            with torch._dynamo.config.patch(recompile_limit=VARIANTS):
                yield
        finally:
            for layer, _ in self._forwards:
                del layer.forward
