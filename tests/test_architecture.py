"""The arrows of the design, read from the import statements of every module."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

import fedflame

SOURCE = Path(fedflame.__file__).parent

STAGES = (
    ("errors", "choices", "k_rotation", "seeds", "refused_families"),
    ("settings",),
    ("config", "atomic_file", "mapped_base", "messages", "model_shape", "tracking"),
    ("budgets", "data", "moe", "base_model", "regularizers", "token_loss", "wire"),
    ("cost", "client", "strategies", "bench", "error_feedback"),
    ("evaluation",),
    ("server",),
    ("trainer",),
    ("report", "export"),
    ("engines",),
    ("compare",),
    ("commands",),
    ("cli",),
    ("__main__",),
)
"""A part of the package imports only parts of earlier stages. A new part needs a place here."""


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(SOURCE.parent).with_suffix("").parts).removesuffix(".__init__")


PATHS = {module_name(path): path for path in sorted(SOURCE.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in PATHS.items()}


def imports(name: str, on_import: bool = False) -> set[str]:
    """Modules that a module imports anywhere, or with `on_import` those that importing it imports."""
    found: set[str] = set()
    waiting: list[ast.AST] = [TREES[name]]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{name}: relative imports hide the arrows"
            submodules = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {node.module} | (submodules & PATHS.keys())
        elif on_import and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        waiting += ast.iter_child_nodes(node)
    return found


def loaded_by(name: str) -> set[str]:
    """What `import name` loads by our own import statements; of other packages the first name only."""
    loaded: set[str] = set()
    waiting = {name}
    while waiting:
        module = waiting.pop()
        if module in loaded:
            continue
        loaded.add(module)
        if module in PATHS:
            parts = module.split(".")
            packages = {".".join(parts[:length]) for length in range(1, len(parts))}
            waiting |= packages | imports(module, on_import=True)
    return {module if module in PATHS else module.split(".")[0] for module in loaded}


def part(module: str) -> str | None:
    """`fedflame.moe.rescaler` belongs to `moe`; None outside the package."""
    names = module.split(".")
    return names[1] if names[0] == "fedflame" and len(names) > 1 else None


def modules_of(*parts: str) -> list[str]:
    return [name for name in PATHS if part(name) in parts]


def third_party(modules: set[str]) -> set[str]:
    names = {module.split(".")[0] for module in modules}
    return names - sys.stdlib_module_names - {"fedflame"}


def parts_imported(*parts: str) -> set[str]:
    return {part(module) or "" for name in modules_of(*parts) for module in imports(name)} - {"", *parts}


def test_every_part_has_a_stage() -> None:
    placed = {name for stage in STAGES for name in stage}
    assert {part(name) for name in PATHS} - {None} <= placed


def test_every_part_imports_only_parts_of_earlier_stages() -> None:
    stage_of = {name: index for index, stage in enumerate(STAGES) for name in stage}
    arrows = {(part(name), part(module)) for name in PATHS for module in imports(name)}
    backward = {
        f"{importer} imports {imported}"
        for importer, imported in arrows
        if importer and imported and importer != imported and stage_of[importer] <= stage_of[imported]
    }
    assert backward == set()


def test_messages_and_their_bytes_need_nothing_but_torch_safetensors_and_numpy() -> None:
    assert third_party(loaded_by("fedflame.messages")) == {"torch"}
    assert parts_imported("messages") == {"choices", "errors"}
    assert third_party(loaded_by("fedflame.wire.codec")) == {"torch", "safetensors", "numpy"}
    assert parts_imported("wire") == {"choices", "errors", "messages"}


def test_strategies_know_messages_and_tensors_but_no_model_and_no_engine() -> None:
    for name in modules_of("strategies"):
        assert third_party(imports(name)) <= {"torch"}, name
        assert third_party(loaded_by(name)).isdisjoint({"transformers", "peft", "datasets"}), name
        parts = {part(module) for module in imports(name)} - {None, "strategies"}
        known = {"config", "errors"} if name == "fedflame.strategies" else {"choices", "messages", "seeds"}
        assert parts <= known, name


def test_mechanisms_know_neither_configuration_nor_data_nor_server() -> None:
    assert parts_imported("moe") <= {"choices", "errors", "seeds", "messages", "refused_families"}


def test_only_the_moe_package_knows_peft() -> None:
    users = {part(name) for name in PATHS if "peft" in third_party(imports(name))}
    assert users <= {"moe", "export", "bench"}


def test_the_client_knows_no_strategy_and_no_server() -> None:
    assert parts_imported("client") <= {
        "data",
        "errors",
        "messages",
        "moe",
        "regularizers",
        "seeds",
        "token_loss",
    }


START_FAST = (
    "errors config atomic_file model_shape budgets cost tracking report compare.files commands.compare cli"
)


@pytest.mark.parametrize("name", [*START_FAST.split(), "__main__"])
def test_what_must_start_fast_loads_no_heavy_package(name: str) -> None:
    heavy = {
        "torch",
        "transformers",
        "peft",
        "datasets",
        "safetensors",
        "numpy",
        "rouge_score",
        "flwr",
        "nvflare",
    }
    assert f"fedflame.{name}" in PATHS
    assert loaded_by(f"fedflame.{name}") & heavy == set()


def test_the_report_needs_no_package_but_what_the_configuration_needs() -> None:
    for name in modules_of("report"):
        assert third_party(imports(name)) == set(), name
        assert third_party(loaded_by(name)) <= {"pydantic"}, name


@pytest.mark.parametrize("name", ["relay", "executor", "job"])
def test_what_runs_in_a_process_of_nvflare_loads_no_torch(name: str) -> None:
    loaded = loaded_by(f"fedflame.engines.nvflare.{name}")
    assert third_party(loaded) <= {"nvflare", "numpy"}
    assert {part(module) for module in loaded} - {None} <= {"engines", "errors", "trainer", "wire"}


def test_what_runs_in_a_process_of_flower_loads_no_torch() -> None:
    carried = {"engines", "errors", "trainer", "wire"}
    for_every_message = loaded_by("fedflame.engines.flower.client_app")
    assert third_party(for_every_message) <= {"flwr"}
    assert {part(module) for module in for_every_message} - {None} <= carried
    on_the_hub = loaded_by("fedflame.engines.flower.server_app")
    assert third_party(on_the_hub) <= {"flwr", "pydantic"}, "pydantic reads the hub's file"
    assert {part(module) for module in on_the_hub} - {None} <= carried | {"settings"}


def test_only_its_own_adapter_knows_an_engine() -> None:
    for package, folder in (("nvflare", "nvflare"), ("flwr", "flower")):
        users = {name for name in PATHS if package in third_party(imports(name))}
        assert all(name.startswith(f"fedflame.engines.{folder}.") for name in users), users


def test_the_process_of_the_driver_loads_no_engine() -> None:
    for name in ("nvflare.engine", "flower.engine", "clients", "segment"):
        loaded = loaded_by(f"fedflame.engines.{name}")
        assert third_party(loaded).isdisjoint({"nvflare", "flwr"}), name


def test_only_main_imports_the_command_line() -> None:
    importers = {name for name in PATHS for module in imports(name) if part(module) == "cli"}
    assert importers - set(modules_of("cli")) <= {"fedflame.__main__"}


def test_no_module_is_named_after_nothing() -> None:
    vague = {"utils", "util", "helpers", "helper", "common", "misc", "tools", "core", "base_utils"}
    assert {name for name in PATHS if vague & set(name.split("."))} == set()


def test_the_example_imports_the_library_in_main_only() -> None:
    path = Path(__file__).parents[1] / "examples" / "flame_from_scratch.py"
    tree = ast.parse(path.read_text(encoding="utf-8"))
    main = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main")
    inside = {id(node) for node in ast.walk(main)}
    froms = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom | ast.Import)]
    outside = [ast.unparse(node) for node in froms if id(node) not in inside]
    assert outside and not any("fedflame" in statement for statement in outside)
