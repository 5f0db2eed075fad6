"""The frozen MoE block of the benchmark: OLMoE's block with random weights, and copies that share them."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, OlmoeConfig, OlmoeForCausalLM

from fedflame.errors import UserError

DTYPES = ("bfloat16", "float32")
SEED = 0
AnyModule = TypeVar("AnyModule", bound=nn.Module)


@dataclass(frozen=True)
class Geometry:
    """The sizes of the block, named as in transformers and PEFT. Raises UserError if they cannot run here."""

    hidden_size: int
    intermediate_size: int
    num_experts: int
    r: int
    dtype: str
    device: str

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise UserError(f"--dtype {self.dtype}: must be one of {', '.join(DTYPES)}")
        if self.device not in ("cpu", "cuda") or (self.device == "cuda" and not torch.cuda.is_available()):
            usable = "cpu or cuda" if torch.cuda.is_available() else "cpu (torch finds no CUDA here)"
            raise UserError(f"--device {self.device}: must be {usable}")
        for name in ("hidden_size", "intermediate_size", "r"):
            size, multiple = getattr(self, name), 16 // self.torch_dtype.itemsize
            if size % multiple:
                option = f"--{name.replace('_', '-')}"
                raise UserError(
                    f"{option} {size}: grouped_mm needs rows of a multiple of 16 bytes, "
                    f"in {self.dtype} a multiple of {multiple}"
                )

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of weights and activations."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype


def frozen_model(geometry: Geometry) -> OlmoeForCausalLM:
    """Build a model of one layer, of which only the MoE block is measured.

    All weights are drawn from a normal distribution with standard deviation 0.02, as OLMoE is initialized.
    The router then loads its experts almost evenly.
    """
    config = OlmoeConfig(
        vocab_size=8,
        hidden_size=geometry.hidden_size,
        intermediate_size=geometry.intermediate_size,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_experts=geometry.num_experts,
        num_experts_per_tok=geometry.num_experts,
        pad_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng(), torch.device(geometry.device):
        torch.manual_seed(SEED)
        model: OlmoeForCausalLM = AutoModelForCausalLM.from_config(
            config, dtype=geometry.torch_dtype, trust_remote_code=False
        )
    return model.requires_grad_(False)


def sharing_copy(module: AnyModule) -> AnyModule:
    """Copy the modules, but share their parameters with the original."""
    return copy.deepcopy(module, {id(kept): kept for kept in module.parameters()})


def random_rows(geometry: Geometry, rows: int, width: int, seed: int) -> Tensor:
    """Return normal values [rows, width]; the same seed gives the same values on the same device."""
    generator = torch.Generator(geometry.device).manual_seed(seed)
    values = torch.randn(rows, width, generator=generator, device=geometry.device)
    return values.to(geometry.torch_dtype)
