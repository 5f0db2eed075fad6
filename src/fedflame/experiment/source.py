"""What can be evaluated: a run, an adapter or a base model; its configuration and its values."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from fedflame.base.files import model_config_path
from fedflame.config.load import load_config
from fedflame.config.run_config import RunConfig
from fedflame.cost.model_shape import read_model_shape
from fedflame.errors import UserError
from fedflame.experiment.run_folder import is_run, saved_config
from fedflame.experiment.used_model import used_states

if TYPE_CHECKING:
    from fedflame.moe.adapted_model import AdaptedModel
    from fedflame.strategies.base import ServerState


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter, of ours or of PEFT."""
    return (folder / "adapter_config.json").is_file()


def source_config(source: str, wanted: list[int], overrides: list[str]) -> tuple[RunConfig, int]:
    """The run's configuration, or the defaults with the source's model, adapter and tiers; its rank."""
    place = Path(source)
    if is_run(place):
        return load_config(saved_config(place), overrides), 0
    name, adapter, tiers, rank = source, RunConfig().adapter, wanted, 0
    if is_adapter(place):
        from fedflame.exports import read_settings, rescaler_tiers

        settings = read_settings(place)
        name, adapter = _base_of(source, settings.base_model), settings.adapter
        tiers, rank = wanted or rescaler_tiers(place), settings.adapter.r
    shape = read_model_shape(model_config_path(name))
    tiers = tiers or [shape.num_experts_per_tok]
    given = [f"model.model_name_or_path={name}", f"clients.num_clients={len(tiers)}"]
    given.append(f"clients.active_experts={','.join(map(str, tiers))}")
    return load_config(RunConfig(adapter=adapter), [*given, *overrides]), rank


def _base_of(source: str, base_model: str | None) -> str:
    if not base_model:
        raise UserError(f"{source}: adapter_config.json names no base model")
    return base_model


def source_states(source: Path, adapted: AdaptedModel, seed: int) -> Callable[[int], ServerState]:
    """What gives adapter, rescalers and merged factors of a source at k; of a base model, a run's start."""
    from fedflame.exports import load_adapter, load_rescalers, load_tier_adapters
    from fedflame.strategies.base import ServerState

    if is_run(source):
        return used_states(source)
    if is_adapter(source):
        state = ServerState(
            load_adapter(source, adapted, seed),
            load_rescalers(source, adapted),
            tier_adapters=load_tier_adapters(source, adapted, seed),
        )
    else:
        state = ServerState(adapted.initial_adapter(seed), {})
    return lambda k: state
