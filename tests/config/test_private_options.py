from __future__ import annotations

from typing import Any

import pytest

from fedflame.config.load import load_config
from fedflame.config.privacy_section import PrivacyConfig
from fedflame.config.private_options import _SWITCHES
from fedflame.config.run_config import RunConfig
from fedflame.errors import UserError

PRIVATE = {"privacy": {"unit": "row"}}


def test_without_privacy_nothing_changes() -> None:
    assert load_config({}) == RunConfig()
    assert load_config({"privacy": {"unit": "none"}}).strategy.temperature == 1.0


def test_with_private_rows_no_count_weighs_unless_it_is_asked_for() -> None:
    assert load_config(PRIVATE).strategy.temperature == 0
    assert load_config(None, ["privacy.unit=row"]).strategy.temperature == 0
    assert load_config(load_config(PRIVATE)).strategy.temperature == 0


def test_methods_without_that_option_keep_its_default() -> None:
    config = load_config(PRIVATE | {"strategy": {"name": "fedavg"}})
    assert config.strategy.temperature == 1.0


@pytest.mark.parametrize(
    "setting",
    [
        "strategy.temperature=1",
        "training.budget=compute",
        "training.tokens_per_step=512",
        "training.packing=true",
        "training.padding_free=true",
        "training.gradient_accumulation_steps=2",
        "training.router_aux_loss_coef=0.01",
        "adapter.lora_dropout=0.1",
        "server.fraction_evaluate=0.5",
        "strategy.rescaler=mass",
        "strategy.k_rotation=all",
        "model.dtype=float16",
    ],
)
def test_an_option_that_would_break_the_guarantee_is_refused_by_name(setting: str) -> None:
    key = setting.partition("=")[0]
    load_config(None, [setting])
    with pytest.raises(UserError, match=rf"config: {key} = .*: with privacy.unit = 'row', .*; set "):
        load_config(None, ["privacy.unit=row", setting])


@pytest.mark.parametrize(
    "values",
    [{"privacy": "row"}, {"privacy": {"unit": "person"}}, PRIVATE | {"strategy": 3},
     PRIVATE | {"strategy": {"name": ["flame"]}}, {"privacy": {"epsilon": 0}}, {"privacy": {"delta": 1}}],
)  # fmt: skip
def test_a_section_of_another_form_is_one_line(values: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"^config: "):
        load_config(values)


@pytest.mark.parametrize(
    "key, switch",
    [
        ("epsilon", "unit"),
        ("delta", "unit"),
        ("noise_multiplier", "unit"),
        ("clip_norm", "unit"),
        ("clipping", "unit"),
        ("min_group", "secure_aggregation"),
    ],
)
def test_how_to_protect_without_whether_is_refused(key: str, switch: str) -> None:
    given = {key: PrivacyConfig.model_fields[key].default}
    wanted = rf"^config: privacy\.{key} is set without privacy\.{switch}, .*; set privacy\.{switch} to "
    for config in ({"privacy": given}, RunConfig(privacy=PrivacyConfig(**given))):
        with pytest.raises(UserError, match=wanted):
            load_config(config)
    off = PrivacyConfig.model_fields[switch].default
    assert load_config({"privacy": {**given, switch: off}}) == RunConfig()


def test_no_key_of_privacy_but_the_switches_can_be_set_alone() -> None:
    assert {*_SWITCHES, *(key for _, _, keys in _SWITCHES.values() for key in keys)} == {
        *PrivacyConfig.model_fields
    }


def test_a_configuration_that_says_everything_is_read() -> None:
    assert load_config(RunConfig().model_dump()) == RunConfig()
