"""The base model with LoRA, rescalers and counts attached. All clients share it and load their values."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import cached_property
from typing import Any, cast

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from fedflame.config.lora_scale import lora_scale
from fedflame.config.words import Checkpointed, Dtype, Trainable
from fedflame.cost.refused_families import require_balanced
from fedflame.errors import UserError
from fedflame.messages import NOTHING, Adapter, is_trained, rank_dim
from fedflame.moe.activation_counts import ActivationCounts
from fedflame.moe.active_experts import active_experts
from fedflame.moe.compiled import CompiledLayers, can_compile
from fedflame.moe.expert_lora import (
    EXPERTS_IMPLEMENTATION,
    ExpertLoRA,
    initial_banks,
    leave_experts_uncompiled,
)
from fedflame.moe.families import find_moe_layers, require_aligned
from fedflame.moe.gradient_checkpointing import (
    checkpointable_layers,
    layers_checkpointed,
    require_checkpointable,
)
from fedflame.moe.load_balancing import LoadBalancing
from fedflame.moe.merged_base import MergedBase
from fedflame.seeds import generator


class AdaptedModel:
    """A frozen Hugging Face SMoE model with expert LoRA, attention LoRA, rescalers and counts.

    Args:
        model: the base model; it is frozen and changed in place.
        r: LoRA rank of all modules; `load` may attach fewer ranks for a client.
        lora_alpha: the low-rank product B A is scaled by lora_alpha / r; see `use_rslora`.
        target_modules: attention projections that get LoRA through PEFT; empty for LoRA on experts only.
        gradient_checkpointing: what the backward pass recomputes to save memory; see
            `moe.gradient_checkpointing`.
        mapped: the weights are mapped from files and stay there; otherwise those of the experts move into
            buffers with their LoRA values (`moe.projection`).
        use_rslora: the scale is lora_alpha / sqrt(r).

    The model must lie on its device already; what is attached lies on the device of its layer.

    Raises:
        UserError: the model is not a supported SMoE, or has none of the target modules.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        r: int,
        lora_alpha: float,
        target_modules: Iterable[str],
        gradient_checkpointing: Checkpointed = "none",
        mapped: bool = False,
        use_rslora: bool = False,
    ) -> None:
        if gradient_checkpointing == "layers":
            require_checkpointable(model)
        self.gradient_checkpointing = gradient_checkpointing
        self.model = model.requires_grad_(False)
        self.layers = find_moe_layers(model)
        require_aligned(self.layers)
        # First, because PEFT freezes every parameter that is not its own.
        of_attention = LoraConfig(
            r=r,
            lora_alpha=lora_alpha,  # type: ignore[arg-type]
            use_rslora=use_rslora,
            target_modules=list(target_modules),
        )
        self.attention = _inject_attention_lora(model, of_attention)
        self.r, self.scale = r, lora_scale(lora_alpha, r, use_rslora)
        self.counts = ActivationCounts(len(self.layers), self.layers[0].num_experts, self.device)
        recompute = gradient_checkpointing == "experts"
        self.loras = [
            ExpertLoRA(layer, index, r, self.scale, self.counts, recompute, mapped)
            for index, layer in enumerate(self.layers)
        ]
        for layer, lora in zip(self.layers, self.loras, strict=True):
            layer.experts.fedflame = lora
        self._compiled = self._compiled_layers()
        self._base = MergedBase(model, self.layers, self.attention, self.scale)
        model.set_experts_implementation(EXPERTS_IMPLEMENTATION)

    @property
    def dtype(self) -> Dtype:
        """The dtype of the frozen base."""
        return cast(Dtype, str(self.model.dtype).removeprefix("torch."))

    @property
    def device(self) -> torch.device:
        """Where the model takes its input."""
        device: torch.device = self.model.device
        return device

    @property
    def devices(self) -> list[torch.device]:
        """Where its experts lie: one device, or several if the layers are spread over cards."""
        return list(dict.fromkeys(lora.s.device for lora in self.loras))

    @property
    def can_capture(self) -> bool:
        """Whether a training step is one GPU's alone and launches the same kernels every time."""
        return self._compiled is not None

    @cached_property
    def load_balancing(self) -> LoadBalancing:
        """The load-balancing loss of the routers. Raises UserError for a family without one."""
        require_balanced(self.model.config.get_text_config().model_type)
        if self._compiled is not None:
            torch._dynamo.reset()  # what was compiled already knows nothing of its hooks
        return LoadBalancing(self.layers)

    @property
    def vocabulary(self) -> int:
        """The number of token ids that it has an embedding for."""
        embeddings: Any = self.model.get_input_embeddings()
        return int(embeddings.weight.shape[0])

    @property
    def num_experts_per_tok(self) -> int:
        """K, the model's own number of active experts."""
        return self.layers[0].num_experts_per_tok

    def initial_adapter(self, seed: int) -> Adapter:
        """Return the adapter at the start of a run: A is drawn from the seed, B is zero."""
        experts = {
            f"{index}.{name}": bank
            for index, layer in enumerate(self.layers)
            for name, bank in initial_banks(layer, self.r, generator(seed, "experts", index)).items()
        }
        attention = {}
        shapes = _shapes(self.attached(), self.r)
        for name in self.attention:
            value = torch.zeros(shapes[f"attention.{name}"])
            if name.endswith(".A"):
                bound = value.shape[1] ** -0.5
                value = value.uniform_(-bound, bound, generator=generator(seed, "attention", name))
            attention[name] = value
        return Adapter(experts, attention)

    def load(self, adapter: Adapter, rescaler_values: Tensor, merged: Adapter = NOTHING) -> None:
        """Load the LoRA values and rescalers of a client, and merge the factors `merged` into the base.

        Args:
            adapter: values for this model and its target modules, of the model's rank or a smaller one. The
                scale is that of the model's rank in both cases.
            rescaler_values: [L] s per MoE layer.
            merged: factors with the names of `adapter`, of any rank. The base weights become
                W + c B A with the scale c; without factors they are exactly the original weights.

        Raises:
            UserError: the values do not fit the model. Nothing was changed.
        """
        attached, values = self.attached(), adapter.tensors()
        _require_shapes("adapter", values, _shapes(attached, min(adapter.rank or self.r, self.r)))
        if merged.tensors():
            _require_shapes("merged", merged.tensors(), _shapes(attached, merged.rank))
        with torch.no_grad():
            for name, parameter in attached.tensors().items():
                if parameter.shape != values[name].shape:
                    parameter.data = parameter.new_empty(values[name].shape)
                parameter.copy_(values[name])
            for lora, value in zip(self.loras, rescaler_values, strict=True):
                lora.s.copy_(value)
            self._base.merge(merged)

    def set_trainable(self, trainable: Trainable) -> None:
        """Train only this half (A, B or both) of every expert bank and attention LoRA."""
        for name, parameter in self.attached().tensors().items():
            parameter.requires_grad_(is_trained(name, trainable))

    def attached(self) -> Adapter:
        """Return the trainable parameters themselves, not copies, as an adapter."""
        banks = {f"{lora.index}.{name}": bank for lora in self.loras for name, bank in lora.banks().items()}
        return Adapter(banks, self.attention)

    def adapter(self) -> Adapter:
        """Return a copy of the current LoRA values on the CPU."""
        values = {
            name: value.detach().to("cpu", copy=True) for name, value in self.attached().tensors().items()
        }
        return Adapter.from_tensors(values)

    def beside(self, adapter: Adapter) -> Adapter:
        """Return the adapter with each value on the device of the parameter that has its name."""
        return self.attached().combine(adapter, lambda value, given: given.to(value.device))

    def learned_since(self, start: Adapter) -> Adapter:
        """Return the current LoRA values minus `start`, on the CPU."""
        return self.attached().combine(start, lambda value, before: value.detach().cpu() - before)

    def rescaler_values(self) -> Tensor:
        """Return a copy of the current rescalers s [L] on the CPU."""
        return torch.stack([lora.s.detach().cpu() for lora in self.loras])

    @contextmanager
    def active_experts(self, k: int) -> Iterator[None]:
        """Run k experts per token within the block; see `moe.active_experts`."""
        with active_experts(self.layers, k):
            yield

    @contextmanager
    def training(self, k: int, lora_dropout: float = 0.0) -> Iterator[None]:
        """Run k experts per token within the block, as a client trains: checkpointed or compiled.

        With `lora_dropout`, torch's generators decide which inputs of every A are dropped.
        """
        layers = self.gradient_checkpointing == "layers"
        with (
            self.active_experts(k),
            self._dropping(lora_dropout) if lora_dropout else nullcontext(),
            layers_checkpointed(self.model) if layers else nullcontext(),
            self._compiled.used() if self._compiled else nullcontext(),
        ):
            yield

    @contextmanager
    def _dropping(self, p: float) -> Iterator[None]:
        """Drop inputs of A with the chance p within the block: PEFT's own way in attention."""
        modules = [module for module in self.model.modules() if isinstance(module, LoraLayer)]
        try:
            for lora in self.loras:
                lora.dropout = p
            for module in modules:
                module.lora_dropout["default"] = nn.Dropout(p)
            yield
        finally:
            for lora in self.loras:
                lora.dropout = 0.0
            for module in modules:
                module.lora_dropout["default"] = nn.Identity()

    def _compiled_layers(self) -> CompiledLayers | None:
        """Return the decoder layers compiled, on one GPU; torch compiles nothing within its checkpoints."""
        if (
            len(self.devices) > 1
            or self.gradient_checkpointing == "layers"
            or not can_compile(self.device.type)
        ):
            return None
        leave_experts_uncompiled()
        return CompiledLayers(checkpointable_layers(self.model), self.gradient_checkpointing == "experts")


def _shapes(adapter: Adapter, rank: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes that the adapter's values would have at this rank."""
    shapes = {}
    for name, value in adapter.tensors().items():
        shape = list(value.shape)
        shape[rank_dim(name)] = shape[rank_dim(name)] // adapter.rank * rank
        shapes[name] = tuple(shape)
    return shapes


def _require_shapes(kind: str, values: Mapping[str, Tensor], wanted: Mapping[str, tuple[int, ...]]) -> None:
    for name in sorted(wanted.keys() | values.keys()):
        got = tuple(values[name].shape) if name in values else None
        if got != wanted.get(name):
            raise UserError(
                f"{kind} value {name} is {got or 'missing'}; the model needs {wanted.get(name, 'none')}"
            )


def _inject_attention_lora(model: PreTrainedModel, lora: LoraConfig) -> dict[str, nn.Parameter]:
    if not lora.target_modules:
        return {}
    _require_projections(model, lora.target_modules)
    with torch.random.fork_rng(devices=[]):  # PEFT draws values that `load` overwrites
        inject_adapter_in_model(lora, model)
    parameters = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            module.cast_input_dtype_enabled = False
            for letter, linears in (("A", module.lora_A), ("B", module.lora_B)):
                linears["default"] = master = _MasterLinear(linears["default"].get_parameter("weight"))
                parameters[f"{name}.{letter}"] = master.weight
    return parameters


def _require_projections(model: PreTrainedModel, target_modules: Iterable[str]) -> None:
    """Raise UserError for a name of no linear map; PEFT says nothing of it where it finds another name."""
    for target in target_modules:
        named = [module for name, module in model.named_modules() if f".{name}".endswith(f".{target}")]
        if not named or not all(isinstance(module, nn.Linear) for module in named):
            raise UserError(
                f"adapter.target_modules {target!r}: {type(model).__name__} has no linear map of this name"
            )


class _MasterLinear(nn.Module):
    """A linear map whose weight is trained in float32, and multiplies in the dtype of its input.

    PEFT's own holds the weight in the dtype of the base, or brings every input to float32.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().float())

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight.to(x.dtype))
