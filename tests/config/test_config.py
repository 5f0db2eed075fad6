"""The configuration: files, overrides and defaults, and which of them wins."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError
from tests.config.written_configs import flat, toml

from fedflame.config.load import load_config
from fedflame.config.run_config import RunConfig
from fedflame.config.settings import keys_of
from fedflame.errors import UserError


def test_without_file_and_overrides_every_value_is_the_default() -> None:
    assert load_config(None, []) == RunConfig()


def test_an_override_beats_the_file_and_the_file_beats_the_default(tmp_path: Path) -> None:
    path = toml(tmp_path, "seed = 5\n[data]\nalpha = 0.25\nmax_rows = 100\n[clients]\nnum_clients = 3\n")
    config = load_config(path, ["data.alpha=0.125", " clients.num_clients = 7 "])
    wanted = flat(RunConfig()) | {
        "seed": 5,
        "data.alpha": 0.125,
        "data.max_rows": 100,
        "clients.num_clients": 7,
    }
    assert flat(config) == wanted


def test_the_last_of_two_overrides_wins() -> None:
    assert load_config(None, ["seed=1", "seed=2"]).seed == 2


def test_an_override_may_hold_equals_signs_and_be_empty() -> None:
    config = load_config(None, ["model.model_name_or_path=a=b", "adapter.target_modules="])
    assert (config.model.model_name_or_path, config.adapter.target_modules) == ("a=b", ())


def test_overrides_of_a_configuration_leave_it_and_its_other_values_alone() -> None:
    config = load_config(None, ["seed=5", "data.alpha=0.25"])
    changed = load_config(config, ["data.alpha=0.125", "output_dir=elsewhere"])
    assert flat(changed) == flat(config) | {"data.alpha": 0.125, "output_dir": "elsewhere"}
    assert config.data.alpha == 0.25
    with pytest.raises(UserError, match=r"nearest valid key is 'data\.alpha'"):
        load_config(config, ["data.alhpa=1"])


def test_every_field_is_a_scalar_or_a_list_of_them_and_keys_of_names_it() -> None:
    values = flat(RunConfig())
    assert keys_of(RunConfig) == list(values)
    assert {type(value) for value in values.values()} <= {str, int, float, bool, tuple}
    assert {"seed", "output_dir", "data.alpha", "training.per_device_train_batch_size"} <= values.keys()


@pytest.mark.parametrize("key", keys_of(RunConfig))
def test_every_key_takes_its_default_as_an_override(key: str) -> None:
    value = flat(RunConfig())[key]
    text = ",".join(map(str, value)) if isinstance(value, tuple) else value
    off = ["privacy.unit=none", "privacy.secure_aggregation=false"]  # said, since keys beside them need them
    assert load_config(None, [*off, f"{key}={text}"]) == RunConfig()


@pytest.mark.parametrize("written", ['"4,2"', "[4, 2]", '["4", "2"]', '"[4, 2]"', '" 4 , 2 "'])
def test_a_list_may_be_written_as_a_list_or_as_text(written: str, tmp_path: Path) -> None:
    config = load_config(toml(tmp_path, f"[clients]\nactive_experts = {written}\n"))
    assert config.clients.active_experts == (4, 2)
    assert config == load_config({"clients": {"active_experts": [4, 2]}})


def test_names_may_be_written_as_a_list_or_as_text(tmp_path: Path) -> None:
    listed = load_config(toml(tmp_path, '[adapter]\ntarget_modules = ["q_proj", "v_proj"]\n'))
    assert listed.adapter.target_modules == ("q_proj", "v_proj")
    assert load_config(None, ["adapter.target_modules=q_proj, v_proj"]) == listed


def test_a_configuration_may_be_a_dict_which_stays_as_it_is() -> None:
    given = {"data": {"alpha": 0.25}, "strategy": {"active_experts": 2, "name": "fedavg"}}
    config = load_config(given, ["data.alpha=0.5"])
    assert (config.data.alpha, config.strategy.active_experts) == (0.5, "2")
    assert given["data"] == {"alpha": 0.25}
    with pytest.raises(UserError) as refused:
        load_config(7)  # type: ignore[arg-type]
    assert str(refused.value) == (
        "config: got int; it must be the path of a TOML file, a dict or a RunConfig"
    )


def test_a_configuration_cannot_be_changed() -> None:
    config = load_config(None, [])
    with pytest.raises(ValidationError, match="frozen"):
        config.seed = 1
    with pytest.raises(ValidationError, match="frozen"):
        config.data.alpha = 1.0


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda", "cuda:0", "cuda:12"])
def test_a_device_is_named_as_in_torch(device: str) -> None:
    assert load_config(None, [f"model.device={device}"]).model.device == device
