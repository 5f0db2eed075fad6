"""`fedflame.moe.triton_products` without a GPU: it waits for no value, its values are right, it compiles."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.skipif(
    find_spec("triton") is None, reason="Triton is not installed; there are wheels for Linux on x86-64"
)

IN, OUT, LOW, EXPERTS, ROWS = 2048, 1024, 8, 64, 8192
CALLS = ("forward", "backward", "few rows", "thin", "outer, thin left", "outer, thin right")
SHARED_KB = {80: 163, 89: 99, 90: 227, 120: 99}
"""The shared memory that a block can have, by compute capability (CUDA C++ Programming Guide)."""
POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
}
"""Triton's names for the types of operands."""


class Launch(NamedTuple):
    kernel: Any
    grid: tuple[int, ...]
    operands: dict[str, Tensor]
    constants: dict[str, int]
    product: Tensor


class Remembered:
    """Takes the place of a kernel and keeps what that would be launched with."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*values: Any, **constants: int) -> None:
            given = dict(zip(self.kernel.arg_names, values, strict=False)) | constants
            self.grid = grid
            self.operands = {name: value for name, value in given.items() if isinstance(value, Tensor)}
            self.constants = {name: value for name, value in given.items() if name not in self.operands}

        return launch


def meta(*shape: int, dtype: torch.dtype) -> Tensor:
    """No values and no memory: whatever waits for a value raises."""
    return torch.empty(shape, dtype=dtype, device="meta")


def launched(call: str, dtype: torch.dtype) -> Launch:
    """Call a product with operands like those of OLMoE, joined with LoRA, and remember the launch."""
    from fedflame.moe import triton_products as module

    rows, wide = meta(ROWS, IN + LOW, dtype=dtype), meta(ROWS, OUT + LOW, dtype=dtype)
    weights = meta(EXPERTS, OUT + LOW, IN + LOW, dtype=dtype)
    operands = {
        "forward": (rows, weights[:, :OUT].mT),
        "backward": (wide, weights[:, :, :IN]),
        "few rows": (rows[: 4 * EXPERTS], weights[:, :OUT].mT),
        "thin": (rows[:, :IN], weights[:, OUT:, :IN].mT),
        "outer, thin left": (wide[:, OUT:], rows[:, :IN]),
        "outer, thin right": (wide[:, :OUT], rows[:, IN:]),
    }[call]
    name = "outer" if "outer" in call else "times"
    with pytest.MonkeyPatch.context() as patch:
        remembered = Remembered(getattr(module, f"_{name}_kernel"))
        patch.setattr(module, f"_{name}_kernel", remembered)
        product = getattr(module, name)(*operands, meta(EXPERTS, dtype=torch.int32))
    return Launch(remembered.kernel, remembered.grid, remembered.operands, remembered.constants, product)


@pytest.mark.parametrize(
    ("call", "shape", "tiles"),
    [  # tiles are 128 rows high, with 4 rows per expert 16, and as wide as a thin result, at most 128
        ("forward", (ROWS, OUT), (64 + 64) * 8),
        ("backward", (ROWS, IN), (64 + 64) * 16),
        ("few rows", (256, OUT), (16 + 64) * 8),
        ("thin", (ROWS, LOW), (64 + 64) * 1),
        ("outer, thin left", (EXPERTS, LOW, IN), 64 * 1 * 16),
        ("outer, thin right", (EXPERTS, OUT, LOW), 64 * 8 * 1),
    ],
)
def test_a_launch_waits_for_no_value(call: str, shape: tuple[int, ...], tiles: int) -> None:
    launch = launched(call, torch.bfloat16)
    assert (launch.product.shape, launch.product.dtype) == (shape, torch.bfloat16)
    assert launch.grid == (tiles,)


def test_rows_without_unit_stride_are_refused() -> None:
    from fedflame.moe.triton_products import outer, times

    rows, turned = torch.ones(4, 6), torch.ones(6, 4).mT
    weights, offsets = torch.ones(1, 6, 3), torch.tensor([4], dtype=torch.int32)
    for refused in (
        lambda: times(turned, weights, offsets),
        lambda: outer(rows, turned, offsets),
        lambda: outer(turned, rows, offsets),
    ):
        with pytest.raises(ValueError, match=r"strides \(1, 4\): the last must be 1"):
            refused()


@pytest.mark.slow
def test_values_by_the_interpreter() -> None:
    """In a process of its own: Triton reads TRITON_INTERPRET when it is imported."""
    cases = Path(__file__).with_name("interpreted_triton_products.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(cases)],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


TARGETS = (  # the code for float16 is that for bfloat16 but for the type: one card shows that it compiles
    *(pytest.param(torch.bfloat16, card, id=f"bfloat16, {card}") for card in SHARED_KB),
    pytest.param(torch.float16, 90, id="float16, 90", marks=pytest.mark.slow),
    pytest.param(torch.float32, 80, id="float32, 80"),
)


@pytest.mark.slow
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(("dtype", "card"), TARGETS)
def test_kernels_compile_without_spilling(
    call: str, dtype: torch.dtype, card: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    compiled = compile_ahead(launched(call, dtype), card)
    assert compiled.metadata.shared <= SHARED_KB[card] * 1024
    usage = resource_usage(compiled.asm["cubin"], tmp_path / "kernel.cubin")
    assert "STACK:0 " in usage and "LOCAL:0 " in usage
    code = compiled.asm["ptx"]
    bytes_at_once = set(re.findall(r"cp\.async\.c[ag].*?(0x\w+)", code))
    assert bytes_at_once == {"0x10"}, "reads are ahead, and wide"
    assert not re.search(r"ld\.global\S*b16", code), "a read of one value"
    on_tensor_cores = bool(re.search(r"\b(wg)?mma\b", code))
    assert on_tensor_cores == (dtype != torch.float32), "which would round float32"
    assert not re.search(r"\b(atom|red)\.", code), "atomics would add in any order"


def compile_ahead(launch: Launch, card: int) -> Any:
    """Compile what this launch would compile on a GPU, for operands that start at multiples of 16 bytes."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = dict.fromkeys(launch.kernel.arg_names, "constexpr")
    signature |= {name: POINTERS[tensor.dtype] for name, tensor in launch.operands.items()}
    aligned = {(place,): [["tt.divisibility", 16]] for place in range(len(launch.operands))}
    constants = {name: value for name, value in launch.constants.items() if name in signature}
    options = {name: value for name, value in launch.constants.items() if name not in signature}
    source = ASTSource(launch.kernel, signature, constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", card, 32), options=options)


def resource_usage(cubin: bytes, path: Path) -> str:
    import triton

    path.write_bytes(cubin)
    command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
