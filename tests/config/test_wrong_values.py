"""One exact line for everything that a user can get wrong in a configuration."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.config.written_configs import flat, message, toml

from fedflame.config.load import load_config
from fedflame.config.methods import METHODS
from fedflame.config.run_config import RunConfig
from fedflame.config.settings import keys_of
from fedflame.errors import UserError

CHOICE_ERROR = "Value error, must be 'min', 'full' or an integer of at least 1"
LIST_ERROR = 'Value error, must be integers of at least 1, such as [8, 4, 2, 1] or "8,4,2,1"'


@pytest.mark.parametrize(
    ("override", "wanted"),
    [
        ("data.alhpa=1", "config: unknown key 'data.alhpa'; the nearest valid key is 'data.alpha'"),
        ("sed=1", "config: unknown key 'sed'; the nearest valid key is 'seed'"),
        (
            "training.lr=1",
            "config: unknown key 'training.lr'; the nearest valid key is 'training.learning_rate'",
        ),
        (
            "servers.min_clients=1",
            "config: unknown key 'servers.min_clients'; the nearest valid key is 'server.min_clients'",
        ),
        (
            "training.dropout=0.1",
            "config: unknown key 'training.dropout'; the nearest valid key is 'adapter.lora_dropout'",
        ),
        ("seed.x=1", "config: unknown key 'seed.x'; the nearest valid key is 'seed'"),
        ("data=1", "config: data is a section; write data.key=value"),
        ("seed", "--set 'seed': must be section.key=value, such as data.alpha=0.1"),
        ("", "--set '': must be section.key=value, such as data.alpha=0.1"),
        (
            "seed=many",
            "config: seed = 'many': Input should be a valid integer, unable to parse string as an integer",
        ),
        ("seed=-1", "config: seed = '-1': Input should be greater than or equal to 0"),
        (
            "clients.num_clients=2.5",
            "config: clients.num_clients = '2.5': Input should be a valid integer, "
            "unable to parse string as an integer",
        ),
        (
            "clients.num_clients=0",
            "config: clients.num_clients = '0': Input should be greater than or equal to 1",
        ),
        (
            "training.learning_rate=fast",
            "config: training.learning_rate = 'fast': Input should be a valid number, "
            "unable to parse string as a number",
        ),
        ("training.learning_rate=0", "config: training.learning_rate = '0': Input should be greater than 0"),
        (
            "server.fraction_train=1.5",
            "config: server.fraction_train = '1.5': Input should be less than or equal to 1",
        ),
        (
            "model.dtype=float8",
            "config: model.dtype = 'float8': Input should be 'auto', 'float32', 'bfloat16' or 'float16'",
        ),
        *(
            (
                f"model.device={word}",
                f"config: model.device = '{word}': Value error, must be 'auto', 'cpu', 'cuda' or a card such "
                "as 'cuda:1'",
            )
            for word in ("gpu", "cuda:", "cuda:x", "cuda:-1", "cuda:01", "cuda:0,1", "CUDA", "")
        ),
        (
            "strategy.name=fedprox",
            "config: strategy.name = 'fedprox': Input should be 'flame', 'fedavg', 'ffa_lora', 'rolora', "
            "'fedex_lora', 'hetlora', 'flexlora' or 'flora'",
        ),
        ("clients.ranks=8,x", f"config: clients.ranks = '8,x': {LIST_ERROR}"),
        ("clients.ranks=8,9", "config: clients.ranks = 9: must be at most adapter.r = 8"),
        (
            "clients.ranks=1,1,1,1,1",
            "config: clients.ranks has 5 entries for clients.num_clients = 4; it must have at most one per "
            "client",
        ),
        ("strategy.rank=0", f"config: strategy.rank = '0': {CHOICE_ERROR}"),
        (
            "strategy.rank=min",
            "config: strategy.rank = 'min': flame has no such option; fedavg, ffa_lora, rolora, fedex_lora "
            "have it (leave it at 'full')",
        ),
        ("clients.active_experts=", f"config: clients.active_experts = '': {LIST_ERROR}"),
        ("clients.active_experts=8,,4", f"config: clients.active_experts = '8,,4': {LIST_ERROR}"),
        ("clients.active_experts=8,4,", f"config: clients.active_experts = '8,4,': {LIST_ERROR}"),
        ("clients.active_experts=8,0", f"config: clients.active_experts = '8,0': {LIST_ERROR}"),
        ("clients.active_experts=8,-2", f"config: clients.active_experts = '8,-2': {LIST_ERROR}"),
        ("clients.active_experts=8;4", f"config: clients.active_experts = '8;4': {LIST_ERROR}"),
        ("training.tokens_per_step=0", f"config: training.tokens_per_step = '0': {LIST_ERROR}"),
        ("training.tokens_per_step=1k", f"config: training.tokens_per_step = '1k': {LIST_ERROR}"),
        (
            "training.gradient_checkpointing=true",
            "config: training.gradient_checkpointing = 'true': Input should be 'none', 'experts' or 'layers'",
        ),
        (
            "training.packing_strategy=wrapped",
            "config: training.packing_strategy = 'wrapped': Input should be 'bfd'",
        ),
        (
            "training.tokens_per_step=64,64,64,64,32",
            "config: training.tokens_per_step has 5 entries for clients.num_clients = 4; "
            "it must have at most one per client",
        ),
        (
            "strategy.active_experts=max",
            f"config: strategy.active_experts = 'max': {CHOICE_ERROR}",
        ),
        (
            "strategy.active_experts=0",
            f"config: strategy.active_experts = '0': {CHOICE_ERROR}",
        ),
    ],
)
def test_a_wrong_override_is_one_line_that_says_what_is_allowed(override: str, wanted: str) -> None:
    assert message(override) == wanted


OTHER_VALUES = {
    "temperature": "2",
    "rescaler": "none",
    "count_normalization": "token",
    "tier_affinity": "1",
    "k_rotation": "none",
    "learning_rate_exponent": "0.5",
    "counted_rows": "held",
    "active_experts": "2",
    "rank": "2",
    "rank_decay": "0.5",
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("option", OTHER_VALUES)
def test_an_option_is_for_the_methods_that_have_it(name: str, option: str) -> None:
    overrides = (f"strategy.name={name}", f"strategy.{option}={OTHER_VALUES[option]}")
    if option in METHODS[name].options:
        load_config(None, list(overrides))
    else:
        assert f"{name} has no such option" in message(*overrides)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize(
    "key", [key for key, default in flat(RunConfig()).items() if isinstance(default, float)]
)
def test_a_number_that_is_not_finite_is_refused(key: str, value: str) -> None:
    assert message(f"{key}={value}").startswith(f"config: {key} = '{value}': Input should be ")


@pytest.mark.parametrize(
    "key", [key for key, value in flat(RunConfig()).items() if type(value) in (int, float)]
)
def test_true_is_no_number(key: str) -> None:
    section, _, name = key.rpartition(".")
    with pytest.raises(UserError, match=f"^config: {key} = True: Value error, must be a number$"):
        load_config({section: {name: True}} if section else {name: True})


def test_a_warm_up_has_an_end_and_steps_to_count() -> None:
    few = ("training.max_steps=10", "server.num_server_rounds=3")
    load_config(None, [*few, "training.warmup_steps=29", "training.warmup_ratio=0.99"])
    assert message(*few, "training.warmup_steps=30") == (
        "config: training.warmup_steps = 30: must be fewer than the 30 steps of all rounds"
    )
    assert message("training.num_train_epochs=1", "training.warmup_steps=5") == (
        "config: training.warmup_steps = 5: with training.num_train_epochs, clients differ in their steps; "
        "set training.warmup_ratio instead"
    )


def test_a_deeper_key_under_a_value_is_a_user_error_wherever_the_value_came_from(tmp_path: Path) -> None:
    path = toml(tmp_path, "seed = 3\n[data]\nalpha = 0.5\n")
    assert "seed" in message("seed.x=1", path=path)
    assert "data.alpha" in message("data.alpha.x=1", path=path)
    assert "seed" in message("seed=1", "seed.x=1")
    assert "data" in message("data=1", "data.alpha=0.5")
    assert "data.alpha" in message("data.alpha.x=1")


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("[data]\nalhpa = 1\n", "config: unknown key 'data.alhpa'; the nearest valid key is 'data.alpha'"),
        ("data = 1\n", "config: data is a section; write data.key=value"),
        ("[[data]]\nalpha = 1\n", "config: data is a section; write data.key=value"),
        (
            "[clients]\nactive_experts = [8, 2.5]\n",
            f"config: clients.active_experts = [8, 2.5]: {LIST_ERROR}",
        ),
        ("[clients]\nactive_experts = [true]\n", f"config: clients.active_experts = [True]: {LIST_ERROR}"),
        (
            "[adapter]\ntarget_modules = [1]\n",
            "config: adapter.target_modules.0 = 1: Input should be a valid string",
        ),
        (
            "seed = 1.5\n",
            "config: seed = 1.5: Input should be a valid integer, got a number with a fractional part",
        ),
        ("[seed]\nx = 1\n", "config: unknown key 'seed.x'; the nearest valid key is 'seed'"),
        ("output_dir = 7\n", "config: output_dir = 7: Input should be a valid string"),
    ],
)
def test_a_wrong_value_in_the_file_is_one_line_that_says_what_is_allowed(
    tmp_path: Path, text: str, wanted: str
) -> None:
    assert message(path=toml(tmp_path, text)) == wanted


def test_a_missing_file_a_folder_and_no_toml_are_user_errors(tmp_path: Path) -> None:
    missing = tmp_path / "none.toml"
    assert message(path=missing) == f"config file {missing}: No such file or directory"
    assert message(path=tmp_path) == f"config file {tmp_path}: Is a directory"
    path = toml(tmp_path, "seed: 3\n")
    assert message(path=path).startswith(f"config file {path}: not TOML: ")
    path.write_bytes(b"seed = 3 # \xff\n")
    assert message(path=path).startswith(f"config file {path}: not TOML: ")


keys = st.sampled_from(
    [*keys_of(RunConfig), "data", "seed.x", "data.alpha.x", "a.b.c", "", ".", "data.", ".data", "output"]
)
values = st.sampled_from(
    ("1", "0", "-1", "0.5", "x", "", "8,4", "min", "nan", "1e400", "9" * 5000, "a\nb", "='")
)


@settings(deadline=None)
@given(st.lists(st.tuples(keys, st.just("=") | st.just(""), values).map("".join), max_size=4))
def test_any_overrides_give_a_configuration_or_one_line(overrides: list[str]) -> None:
    try:
        config = load_config(None, overrides)
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert all(math.isfinite(value) for value in flat(config).values() if isinstance(value, float))
