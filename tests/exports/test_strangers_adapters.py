"""Adapter folders of strangers, or damaged ones of ours: refused in one line, before memory is taken."""

from __future__ import annotations

import json
import resource
import shutil
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tests.refusals import refusal_of
from tests.tiny_runs import arguments, invoke

from fedflame.errors import UserError
from fedflame.exports import read_settings, rescaler_tiers

PROJECTION = "base_model.model.model.layers.0.self_attn.q_proj"
CONFIG: dict[str, Any] = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": ["q_proj"]}


def adapter(folder: Path, **changed: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | changed))
    tensors = {
        f"{PROJECTION}.lora_A.weight": torch.ones(3, 8),
        f"{PROJECTION}.lora_B.weight": torch.ones(8, 3),
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


@contextmanager
def no_memory_to_take() -> Iterator[None]:
    """Within the block less than a GiB more can be mapped."""
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (mapped + (1 << 30), limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def refusal(folder: Path) -> str:
    with no_memory_to_take():
        line = refusal_of(read_settings, folder)
    assert line.startswith(str(folder))
    return line.removeprefix(str(folder))


def test_the_adapter_that_is_spoilt_below_is_good(tmp_path: Path) -> None:
    assert read_settings(adapter(tmp_path)).adapter.r == 3


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"r": 10**7}, ": r = 10000000 in adapter_config.json: Input should be less than or equal to 65536"),
        ({"r": 60_000}, f": adapter_config.json says rank 60000; '{PROJECTION}.lora_A.weight' has 3"),
        (
            {"rank_pattern": {"q_proj": 9}},
            f": adapter_config.json says rank 9; '{PROJECTION}.lora_A.weight' has 3",
        ),
        ({"rank_pattern": {"q_proj": 10**7}}, "less than or equal to 65536"),
        ({"rank_pattern": {"(a+)+b": 3}}, "a name of at most 256 letters is supported"),
        ({"alpha_pattern": {"[q]_proj": 3}}, "a name of at most 256 letters is supported"),
        ({"lora_alpha": 1e400}, "not JSON: Infinity is no JSON"),
        ({"target_modules": "q_proj|.*"}, "Input should be a valid list"),
        ({"base_model_name_or_path": ["x"]}, "Input should be a valid string"),
        ({"peft_type": "A" * 10_000}, "…"),
        ({"r": "x" * 10_000}, "…"),
    ],
)
def test_settings_that_are_too_much(changed: dict[str, Any], said: str, tmp_path: Path) -> None:
    assert said in refusal(adapter(tmp_path, **changed))


def test_weights_without_lora(tmp_path: Path) -> None:
    adapter(tmp_path)
    save_file({"x": torch.ones(2)}, tmp_path / "adapter_model.safetensors")
    assert refusal(tmp_path) == ": adapter_model.safetensors has no LoRA weights"
    name = f"{PROJECTION}.lora_A.weight"
    save_file(
        {name: torch.tensor(1.0), name.replace("_A", "_B"): torch.ones(2)},
        tmp_path / "adapter_model.safetensors",
    )
    assert refusal(tmp_path).endswith("has 0")


def header(size: int, text: str) -> bytes:
    return struct.pack("<Q", size) + text.encode()


def entry(shape: list[int], end: int) -> str:
    return json.dumps({"x": {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}})


LIES = {
    "a header of 2^62 bytes": header(2**62, "{}"),
    "a header longer than the file": header(10_000, "{}"),
    "values beyond the end": header(len(entry([2**30], 2**32)), entry([2**30], 2**32)),
    "a shape that overflows": header(len(entry([2**40, 2**40], 0)), entry([2**40, 2**40], 0)),
    "a shape that is not its bytes": header(len(entry([4], 4)), entry([4], 4)) + bytes(4),
    "a negative size": header(len(entry([-1], 4)), entry([-1], 4)) + bytes(4),
    "deep JSON": header(100_000, "[" * 100_000),
    "nothing": b"",
}


@pytest.mark.parametrize("lie", LIES)
def test_weights_whose_header_lies(lie: str, tmp_path: Path) -> None:
    (adapter(tmp_path) / "adapter_model.safetensors").write_bytes(LIES[lie])
    assert refusal(tmp_path).startswith("/adapter_model.safetensors: truncated or no safetensors file: ")
    (tmp_path / "rescalers.safetensors").write_bytes(LIES[lie])
    with no_memory_to_take(), pytest.raises(UserError, match="truncated or no safetensors file"):
        rescaler_tiers(tmp_path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(
        st.sampled_from([*CONFIG, "rank_pattern", "alpha_pattern", "use_dora", "init_lora_weights", "x"]),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
        ),
    )
)
def test_any_settings_are_read_or_one_line(tmp_path: Path, changed: dict[str, Any]) -> None:
    try:
        read_settings(adapter(tmp_path, **changed))
    except UserError as error:
        assert "\n" not in str(error)


def test_a_rank_beyond_the_models_matrices_is_refused_before_anything_is_loaded(
    tiny_folder: Path, tmp_path: Path
) -> None:
    for r, said in (
        ("25", "adapter.r = 25: must be at most 20, the"),
        ("10000000", "less than or equal to 65536"),
    ):
        for command in (arguments(tiny_folder, tmp_path / "run", f"adapter.r={r}"),
                        ["plan", "--model", str(tiny_folder), "--set", f"adapter.r={r}"],
                        ["evaluate", str(tiny_folder), "--set", f"adapter.r={r}"]):  # fmt: skip
            with no_memory_to_take():
                result = invoke(*command)
            assert result.exit_code == 2 and said in result.stderr, (command, result.stderr)


def test_our_own_folder_is_whole_or_refused(tiny_folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert invoke(*arguments(tiny_folder, run, "server.num_server_rounds=1")).exit_code == 0
    read_settings(run / "adapter")
    summed = [path for path in (run / "adapter").rglob("*") if path.suffix in (".json", ".safetensors")]
    assert len(summed) > 5, "the folders of the tiers are among them"
    for path in summed:
        folder = tmp_path / "damaged"
        shutil.copytree(run / "adapter", folder)
        spoilt = folder / path.relative_to(run / "adapter")
        for content in (path.read_bytes()[:-3], path.read_bytes().replace(b"1", b"2", 1), None):
            if content is None and path.name == "fedflame.json":
                continue  # without it, it is as a folder of others
            spoilt.unlink()
            if content is not None:
                spoilt.write_bytes(content)
            with pytest.raises(UserError, match=r"^[^\n]*; export it again; without fedflame\.json[^\n]*$"):
                read_settings(folder)
            spoilt.touch()
        shutil.rmtree(folder)


def test_a_folder_of_the_first_version_has_no_checksums_and_is_read(tmp_path: Path) -> None:
    adapter(tmp_path)
    (tmp_path / "fedflame.json").write_text('{"format_version": 1}')
    assert read_settings(tmp_path).adapter.r == 3
    (tmp_path / "fedflame.json").write_text('{"format_version": 2}')
    assert "/fedflame.json: has no checksum" in refusal(tmp_path)
