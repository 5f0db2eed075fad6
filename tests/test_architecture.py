"""The arrows of the design, read from the import statements of every module."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

import fedflame
from fedflame.config.methods import NAMED_METHODS

SOURCE = Path(fedflame.__file__).parent

FLOORS = (
    ("errors", "seeds"),
    ("json_text",),
    ("atomic_file", "reading"),
    ("checked_json", "folder_lock", "page_server"),
    ("config",),
    ("data",),
    ("cost",),
    ("messages",),
    ("wire",),
    ("run_files",),
    ("privacy",),
    ("strategies",),
    ("moe",),
    ("base",),
    ("report", "exports", "trackers"),
    ("training",),
    ("clients",),
    ("server",),
    ("trainer",),
    ("engines",),
    ("experiment",),
    ("compare", "bench"),
    ("commands",),
    ("cli",),
    ("__main__",),
)
"""A room imports only rooms of lower floors, listed first. A new room needs a place here."""


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
        elif on_import and isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            waiting += node.orelse
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


def test_every_room_has_a_floor() -> None:
    placed = {name for floor in FLOORS for name in floor}
    assert {part(name) for name in PATHS} - {None} <= placed


def test_every_room_imports_only_rooms_of_lower_floors() -> None:
    floor_of = {name: index for index, floor in enumerate(FLOORS) for name in floor}
    arrows = {(part(name), part(module)) for name in PATHS for module in imports(name)}
    backward = {
        f"{importer} imports {imported}"
        for importer, imported in arrows
        if importer and imported and importer != imported and floor_of[importer] <= floor_of[imported]
    }
    assert backward == set()


WORDS = "fedflame.config.words"
"""The values that configuration, messages and costs share; no configuration."""


def modules_imported(*rooms: str) -> set[str]:
    """The modules of our own, outside these rooms, that they import; a name of a module counts as it."""
    found = {module for name in modules_of(*rooms) for module in imports(name) if module in PATHS}
    return {module for module in found if part(module) not in (None, *rooms)}


def test_messages_and_their_bytes_need_nothing_but_torch_safetensors_and_numpy() -> None:
    assert third_party(loaded_by("fedflame.messages")) == {"torch"}
    assert modules_imported("messages") == {WORDS}
    assert third_party(loaded_by("fedflame.wire.codec")) == {"torch", "safetensors", "numpy"}
    assert modules_imported("wire") == {WORDS, "fedflame.errors", "fedflame.messages"}


def test_strategies_know_messages_and_tensors_but_no_model_no_configuration_and_no_engine() -> None:
    assert modules_imported("strategies") == {WORDS, "fedflame.messages", "fedflame.seeds"}
    for name in modules_of("strategies"):
        assert third_party(imports(name)) <= {"torch"}, name
        assert third_party(loaded_by(name)).isdisjoint({"transformers", "peft", "datasets", "pydantic"}), name


def test_a_method_is_named_in_its_row_only() -> None:
    methods = set(NAMED_METHODS)
    named = {
        name
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and node.value in methods
    }
    # "flora" also names the draw of its new factors, and `flame` is the default.
    assert named == {
        "fedflame.config.methods",
        "fedflame.config.strategy_section",
        "fedflame.strategies.flora",
    }


def test_mechanisms_know_neither_configuration_nor_data_nor_server() -> None:
    known = {
        WORDS,
        "fedflame.config.lora_scale",
        "fedflame.errors",
        "fedflame.seeds",
        "fedflame.messages",
        "fedflame.cost.refused_families",
    }
    assert modules_imported("moe") == known


def test_only_the_moe_package_knows_peft() -> None:
    users = {part(name) for name in PATHS if "peft" in third_party(imports(name))}
    assert users <= {"moe", "exports", "bench"}


def test_a_clients_round_knows_no_strategy_no_server_and_no_configuration() -> None:
    rooms = {part(module) for module in modules_imported("training") - {WORDS}}
    assert rooms == {"data", "errors", "messages", "moe", "privacy", "run_files", "seeds", "wire"}


def test_the_library_does_not_print() -> None:
    rooms = {part(name) for name in PATHS if "rich" in third_party(imports(name))}
    assert rooms == {"commands", "cli"}


def test_no_module_of_ours_is_over_350_lines() -> None:
    lengths = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in PATHS.items()}
    assert {name: length for name, length in lengths.items() if length > 350} == {}


START_FAST = (
    "errors config.load atomic_file base.files base.dtype cost.run_cost data.given experiment.plan report "
    "experiment.prepare experiment.sites compare.files commands.compare commands.plan commands.site "
    "commands.hub commands.watch trackers.follow trackers.process cli trainer.page trainer.site"
)


HEAVY = {"torch", "transformers", "peft", "datasets", "safetensors", "rouge_score", "flwr", "nvflare"}


@pytest.mark.parametrize("name", [*START_FAST.split(), "__main__"])
def test_what_must_start_fast_loads_no_heavy_package(name: str) -> None:
    assert f"fedflame.{name}" in PATHS
    assert loaded_by(f"fedflame.{name}") & HEAVY == set()


def test_the_report_needs_no_package_but_what_the_configuration_needs() -> None:
    for name in modules_of("report"):
        assert third_party(imports(name)) == set(), name
        assert third_party(loaded_by(name)) <= {"pydantic", "pydantic_core"}, name


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
    ours = {module for module in on_the_hub if module in PATHS and part(module) not in (None, *carried)}
    readers = {"fedflame.reading", "fedflame.json_text"}
    settings = {"fedflame.config", *(f"fedflame.config.{name}" for name in ("lists", "settings", "values"))}
    assert ours <= readers | settings


def test_only_its_own_adapter_knows_an_engine() -> None:
    for package, folder in (("nvflare", "nvflare"), ("flwr", "flower")):
        users = {name for name in PATHS if package in third_party(imports(name))}
        assert all(name.startswith(f"fedflame.engines.{folder}.") for name in users), users


def test_the_process_of_the_driver_loads_no_engine() -> None:
    for name in ("nvflare.engine", "flower.engine", "clients", "jobs"):
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


def test_tests_marked_federation_lie_where_make_looks_for_them() -> None:
    tests, mark = Path(__file__).parent, "pytest.mark." + "federation"
    marked = [path for path in tests.rglob("*.py") if mark in path.read_text(encoding="utf-8")]
    assert marked and {path.parent for path in marked} == {tests / "engines"}
