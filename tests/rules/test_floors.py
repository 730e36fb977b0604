"""Who may import whom: the floors of docs/architecture.md, and no circles."""

from __future__ import annotations

import ast
import graphlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

OURS = ("lora", "models", "training", "demo", "demo_classic", "benchmarks", "tests")
LORA_CODE = {"lora_module", "layers", "stacked", "adapters", "fast"}
NO_LORA = ("lora/data/", "lora/decoder/", "lora/kernels/", "models/bigram_lm_v2.py")
NO_TORCH = (
    *("lora/errors.py", "lora/config.py", "lora/runs/directory.py", "lora/runs/progress.py"),
    *("lora/report/", "lora/scale/", "models/classic_settings.py"),
)
MAX_FOLDER_MODULES, MAX_FLAT_MODULES, MAX_LEVELS = 13, 8, 11
ADVICE = "See the table of floors in docs/architecture.md; a new module gets its place there."

Trees = dict[str, ast.Module]


@pytest.fixture(scope="session")
def floors(root: Path) -> dict[str, int]:
    """By unit, as `unit_of` names it: the floor that docs/architecture.md gives it."""
    text = (root / "docs" / "architecture.md").read_text(encoding="utf-8")
    section = text.split("\n## Floors\n")[1].split("\n## ")[0]
    table = re.findall(r"^\| (\d+) \| (.+) \|$", section, flags=re.MULTILINE)
    return {name.strip(" *"): int(floor) for floor, names in table for name in names.split(",")}


def unit_of(path: str) -> str:
    """Return the name by which the table of floors knows a file: lora/data/x.py is `data`."""
    parts = path.split("/")
    return parts[1].removesuffix(".py") if parts[0] == "lora" else parts[0]


def nodes_that_run(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes under `tree`, without those in `if TYPE_CHECKING:`, which never run."""
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            for other in child.orelse:
                yield from (other, *nodes_that_run(other))
            continue
        yield child
        yield from nodes_that_run(child)


def imported_modules(nodes: Iterator[ast.AST]) -> Iterator[tuple[str, int]]:
    """Yield every module of ours that import statements among `nodes` name, with its line.

    `from a import b` yields a.b, since b may be a module; `imported_files` sorts that out.
    """
    for node in nodes:
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, (
                f"line {node.lineno}: write imports in full, from lora.x import y"
            )
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from ((name, node.lineno) for name in names if name.split(".")[0] in OURS)


def imported_files(
    tree: ast.Module, known: Trees, *, for_types: bool = False
) -> Iterator[tuple[str, int]]:
    """Yield the files of `known` that a module imports when it or its functions run.

    `for_types` adds what it imports under `if TYPE_CHECKING:`.
    """
    nodes = ast.walk(tree) if for_types else nodes_that_run(tree)
    for name, line in imported_modules(nodes):
        parts = name.split(".")
        # The longest part of the name that is a file: the rest names something inside it.
        for length in range(len(parts), 0, -1):
            base = "/".join(parts[:length])
            found = [p for p in (f"{base}.py", f"{base}/__init__.py") if p in known]
            if found:
                yield found[0], line
                break
        else:
            raise AssertionError(f"line {line}: there is no module {name}")


def test_every_module_has_a_floor(product: Trees, floors: dict[str, int]) -> None:
    homeless = sorted({unit_of(path) for path in product} - set(floors))
    assert not homeless, f"no floor is given to {', '.join(homeless)}. {ADVICE}"


def test_every_module_of_the_table_exists_or_is_in_italics(
    root: Path, product: Trees, floors: dict[str, int]
) -> None:
    text = (root / "docs" / "architecture.md").read_text(encoding="utf-8")
    gone = [name for name in floors if name not in {unit_of(path) for path in product}]
    stale = [name for name in gone if not re.search(rf"\*{re.escape(name)}\*", text)]
    assert not stale, f"docs/architecture.md gives a floor to what does not exist: {stale}"


def test_every_file_that_the_page_names_exists(root: Path, product: Trees) -> None:
    text = (root / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`([\w/]+\.py)`", text)) - {"utils.py"}  # which it says is not there
    assert len(named) > 30, "docs/architecture.md no longer describes the layout"
    gone = [n for n in named if not any(f"/{path}".endswith(f"/{n}") for path in product)]
    assert not gone, f"docs/architecture.md describes what does not exist: {sorted(gone)}"


def test_a_folder_imports_lower_floors_only(product: Trees, floors: dict[str, int]) -> None:
    faults = []
    for path, tree in product.items():
        if path == "lora/__init__.py":  # the front door only names what is behind it
            continue
        own = floors.get(unit_of(path), 99)
        for target, line in imported_files(tree, product):
            other = floors.get(unit_of(target), 99)
            is_own = unit_of(target) == unit_of(path) or target == "lora/__init__.py"
            if other >= own and not is_own:
                faults.append(f"{path}:{line} (floor {own}) imports {target} (floor {other})")
    assert not faults, "\n".join([*faults, ADVICE])


def test_no_module_imports_itself_in_a_circle(product: Trees) -> None:
    graph = {
        path: {target for target, _ in imported_files(tree, product)} - {path}
        for path, tree in product.items()
        if path != "lora/__init__.py"
    }
    check_for_circles(graph)


def test_no_module_imports_itself_in_a_circle_for_its_types(product: Trees) -> None:
    # Two modules of one folder that need each other's types are one module, or three.
    graph = {
        path: {
            target
            for target, _ in imported_files(tree, product, for_types=True)
            if unit_of(target) == unit_of(path)
        }
        - {path}
        for path, tree in product.items()
        if not path.endswith("/__init__.py")  # names what is behind it, for type checkers too
    }
    check_for_circles(graph)


def test_no_two_folders_import_each_other(product: Trees) -> None:
    graph: dict[str, set[str]] = {}
    for path, tree in product.items():
        if path != "lora/__init__.py":
            targets = {unit_of(target) for target, _ in imported_files(tree, product)}
            graph.setdefault(unit_of(path), set()).update(targets - {unit_of(path)})
    check_for_circles(graph)


def test_folders_are_of_a_size_that_can_be_read(product: Trees) -> None:
    modules: dict[str, int] = {}
    for path in product:
        folder, _, name = path.rpartition("/")
        if path.startswith("lora/") and name != "__init__.py":
            modules[folder] = modules.get(folder, 0) + 1
    faults = [
        f"{folder} has {n} modules" for folder, n in modules.items() if n > MAX_FOLDER_MODULES
    ]
    assert not faults, f"{faults}: {MAX_FOLDER_MODULES} is the limit, split it by purpose"
    assert modules["lora"] < MAX_FLAT_MODULES, "lora/ has folders for what is not the front door"


def test_the_tree_has_few_levels(product: Trees) -> None:
    graph: dict[str, set[str]] = {}
    for path, tree in product.items():
        if path != "lora/__init__.py":
            targets = {unit_of(target) for target, _ in imported_files(tree, product)}
            graph.setdefault(unit_of(path), set()).update(targets - {unit_of(path), "__init__"})
    levels: dict[str, int] = {}
    for unit in graphlib.TopologicalSorter(graph).static_order():
        levels[unit] = 1 + max((levels[below] for below in graph.get(unit, ())), default=0)
    assert max(levels.values()) <= MAX_LEVELS, sorted(levels.items(), key=lambda item: -item[1])


def check_for_circles(graph: dict[str, set[str]]) -> None:
    """Fail with the names if the imports of `graph` go round."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail("imports go round: " + " <- ".join(error.args[1]))


def test_the_library_never_imports_what_stands_outside_of_it(product: Trees) -> None:
    faults = [
        f"{path}:{line} imports {name}"
        for path, tree in product.items()
        if path.startswith("lora/")
        for name, line in imported_modules(ast.walk(tree))  # for type checkers neither
        if name.split(".")[0] != "lora"
    ]
    assert not faults, "\n".join([*faults, "lora/ is all that pip installs: move it there."])


def test_data_decoder_and_kernels_know_nothing_of_lora(product: Trees) -> None:
    faults = [
        f"{path}:{line} imports {target}"
        for path, tree in product.items()
        if path.startswith(NO_LORA)
        for target, line in imported_files(tree, product)
        if unit_of(target) in LORA_CODE
    ]
    assert not faults, "\n".join(faults)


def test_lora_module_needs_torch_and_our_errors_only(product: Trees) -> None:
    targets = {target for target, _ in imported_files(product["lora/lora_module.py"], product)}
    assert targets == {"lora/errors.py"}


def test_the_quick_modules_do_without_torch(product: Trees) -> None:
    faults = [
        f"{path}:{node.lineno} imports torch"
        for path, tree in product.items()
        if path.startswith(NO_TORCH)
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        and any(name.split(".")[0] == "torch" for name in third_party_names(node))
    ]
    assert not faults, "\n".join([*faults, "`lora --help` must stay quick."])


def third_party_names(node: ast.Import | ast.ImportFrom) -> list[str]:
    """Return the modules that one import statement names."""
    if isinstance(node, ast.ImportFrom):
        return [node.module or ""]
    return [alias.name for alias in node.names]


@pytest.mark.parametrize(
    ("source", "files"),
    [
        ("from lora.data.sequences import packing", ["lora/data/sequences/packing.py"]),
        ("def f():\n    import lora.data.sequences.packing", ["lora/data/sequences/packing.py"]),
        ("from lora.data.sequences.packing import pack", ["lora/data/sequences/packing.py"]),
        ("from lora import LoRALinear", ["lora/__init__.py"]),
        ("import torch", []),
        ("if TYPE_CHECKING:\n    from lora.data.sequences import packing", []),
        ("if TYPE_CHECKING:\n    pass\nelse:\n    import lora.data", ["lora/data/__init__.py"]),
        ("if x:\n    import lora.data", ["lora/data/__init__.py"]),
        ("try:\n    import lora.data\nexcept E:\n    pass", ["lora/data/__init__.py"]),
    ],
)
def test_the_walk_finds_every_way_to_import(source: str, files: list[str]) -> None:
    names = ("lora/__init__.py", "lora/data/__init__.py", "lora/data/sequences/packing.py")
    known = dict.fromkeys(names, ast.parse(""))
    assert [target for target, _ in imported_files(ast.parse(source), known)] == files


def test_the_walk_finds_imports_for_types_where_they_are_wanted() -> None:
    tree = ast.parse("if TYPE_CHECKING:\n    from lora.data import packing")
    known = dict.fromkeys(("lora/data/__init__.py", "lora/data/packing.py"), ast.parse(""))
    found = [target for target, _ in imported_files(tree, known, for_types=True)]
    assert found == ["lora/data/packing.py"]


def test_the_check_for_circles_finds_one() -> None:
    with pytest.raises(pytest.fail.Exception, match="imports go round"):
        check_for_circles({"a": {"b"}, "b": {"a"}})
