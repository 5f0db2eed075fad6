"""Read and write PEFT's `adapter_config.json`: which modules have LoRA, at which rank and scale."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from peft import LoraConfig
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator
from transformers import PreTrainedModel

from fedflame.config.lora_scale import lora_scale
from fedflame.config.sections import Rank
from fedflame.errors import UserError
from fedflame.exports.description import TrainedRun
from fedflame.exports.layouts import (
    DOWN,
    EXPERT_NAMES,
    FUSED_PARAMETERS,
    GATE_UP,
    ExpertNames,
    Layout,
    wrappers,
)
from fedflame.exports.patterns import Pattern, first_match, parse_patterns
from fedflame.moe.families import MoELayer
from fedflame.reading import shown

CONFIG_FILE = "adapter_config.json"

_OTHER_METHODS = (
    "use_dora use_qalora use_bdlora lora_bias modules_to_save trainable_token_indices "
    "layer_replication alora_invocation_tokens arrow_config kasa_config velora_config monteclora_config"
).split()
_INITS_THAT_KEEP_THE_BASE = ("gaussian", "eva", "orthogonal")


class LoraSettings(BaseModel):
    """The settings of a LoRA adapter W + c B A, with r and alpha, and so c, per module or parameter."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    peft_type: Literal["LORA"]
    base_model_name_or_path: str | None = None
    r: Rank
    lora_alpha: Annotated[float, Field(gt=0)]
    use_rslora: bool = False
    target_modules: list[str] = []
    target_parameters: list[str] = []
    rank_pattern: dict[str, Rank] = {}
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] = {}

    @field_validator("target_modules", "target_parameters", "rank_pattern", "alpha_pattern", mode="before")
    @classmethod
    def _null_is_empty(cls, value: Any, info: ValidationInfo) -> Any:
        return cls.model_fields[info.field_name or ""].default if value is None else value

    @field_validator("rank_pattern", "alpha_pattern")
    @classmethod
    def _supported(cls, value: dict[str, Any]) -> dict[str, Any]:
        parse_patterns(value)
        return value

    @cached_property
    def _rank_patterns(self) -> tuple[Pattern, ...]:
        return parse_patterns(self.rank_pattern)

    @cached_property
    def _alpha_patterns(self) -> tuple[Pattern, ...]:
        return parse_patterns(self.alpha_pattern)

    @property
    def expert_names(self) -> ExpertNames | None:
        """The expert names among the target modules; None in the fused layout or without experts."""
        targets = set(self.target_modules)
        found = (names for names in EXPERT_NAMES if targets.issuperset(names.projections))
        return None if self.target_parameters else next(found, None)

    @property
    def attention_modules(self) -> list[str]:
        """The target modules that are not the experts'."""
        experts = self.expert_names.projections if self.expert_names else ()
        return [name for name in self.target_modules if name not in experts]

    def wraps(self, experts: str) -> dict[str, str]:
        """Return PEFT's wrapper name -> the parameter that it adapts, for one experts module."""
        targeted = [
            name for name in FUSED_PARAMETERS if is_target(f"{experts}.{name}", self.target_parameters)
        ]
        return wrappers(experts, targeted)

    def parameter(self, module: str) -> str:
        """Return what rank_pattern and alpha_pattern match: a wrapper's parameter, or the module itself."""
        experts = module.removesuffix(".base_layer")
        wrapped = self.wraps(experts).get(module)
        return f"{experts}.{wrapped}" if wrapped else module

    def rank(self, module: str) -> int:
        """Return the LoRA rank of one module."""
        return self.rank_pattern.get(first_match(self._rank_patterns, self.parameter(module)), self.r)

    def scaling(self, module: str) -> float:
        """Return the factor on the product B A of one module."""
        key = first_match(self._alpha_patterns, self.parameter(module))
        alpha = self.alpha_pattern.get(key, self.lora_alpha)
        return lora_scale(alpha, self.rank(module), self.use_rslora)


def is_target(name: str, targets: Iterable[str]) -> bool:
    """Return whether PEFT targets name this module or parameter, in full or by its last parts."""
    return any(name == target or name.endswith(f".{target}") for target in targets)


def parse_lora_config(path: Path, values: dict[str, Any]) -> LoraSettings:
    """Parse the content `values` of the adapter_config.json in `path`.

    Raises:
        UserError: it is no LoRA, a value is not allowed, or it is a variant other than W + c B A.
    """
    if values.get("peft_type") != "LORA":
        raise UserError(f"{path}: no LoRA adapter: peft_type = {shown(values.get('peft_type'))}")
    variants = [key for key in _OTHER_METHODS if values.get(key)]
    start = values.get("init_lora_weights", True)
    if isinstance(start, str) and start not in _INITS_THAT_KEEP_THE_BASE:
        variants.append(f"init_lora_weights = {shown(start)}")
    if variants:
        raise UserError(f"{path}: LoRA with {', '.join(variants)} is not supported")
    try:
        settings = LoraSettings.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0])
        raise UserError(
            f"{path}: {key} = {shown(values.get(key))} in {CONFIG_FILE}: {first['msg']}"
        ) from error
    if settings.expert_names and (settings.rank_pattern or settings.alpha_pattern):
        raise UserError(f"{path}: rank_pattern or alpha_pattern is not supported in the per-expert layout")
    return settings


def expert_names_of(model: PreTrainedModel) -> ExpertNames | None:
    """Return the per-expert names that PEFT converts to this family's fused experts, or None."""
    for names in EXPERT_NAMES:
        probe = LoraConfig(target_modules=list(names.projections))
        convert_peft_config_for_transformers(probe, model, conversions=None)
        if set(probe.target_parameters or ()) == {*FUSED_PARAMETERS}:
            return names
    return None


def lora_config(
    run: TrainedRun, r: int, layers: Sequence[MoELayer], layout: Layout, names: ExpertNames | None
) -> dict[str, Any]:
    """Return the content of `adapter_config.json` for an adapter of rank r with the run's scale.

    We do not use PEFT's own writer, because its order of target_modules differs between processes. In the
    fused layout gate and up have twice the rank and twice the alpha, under the patterns that PEFT itself
    writes when it saves a loaded per-expert adapter.

    The scale is always alpha/r, also if the run's is alpha/sqrt(r). Of a per-expert adapter with use_rslora
    PEFT would scale gate and up by the root of 2 too much: it fuses them with twice the rank and twice the
    alpha. llama.cpp's converter does not read use_rslora at all.
    """
    alpha = run.adapter.plain_alpha(r)
    targets: dict[str, Any] = {"target_modules": list(run.adapter.target_modules)}
    if layout == "per-expert" and names:
        targets["target_modules"] += names.projections
    else:
        blocks = sorted({layer.name.rpartition(".")[2] for layer in layers})
        pattern = rf".*\.{GATE_UP}"
        targets["target_parameters"] = [f"{b}.experts.{name}" for b in blocks for name in (DOWN, GATE_UP)]
        targets |= {"rank_pattern": {pattern: 2 * r}, "alpha_pattern": {pattern: 2 * alpha}}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": run.base_model,
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        **targets,
        "inference_mode": True,
    }
