"""Imports run downwards (scripts -> eval -> upt -> kernels), in no circle, and take no private names."""

import ast
import importlib
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = ("kernels", "upt", "eval", "scripts")  # from below
ENTRIES = {"upt.trl"}  # what others' programs import, as they run a script
HEAVY = {"torch", "transformers", "peft", "datasets", "pyarrow", "scipy", "matplotlib", "accelerate"}


def modules() -> dict[str, ast.Module]:
    """{dotted name: syntax tree} of all our code but the tests."""
    paths = [
        *ROOT.glob("*.py"),
        *(p for top in ("kernels", "upt", "eval", "bench") for p in ROOT.glob(f"{top}/**/*.py")),
    ]
    tracked = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    names = {p: ".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for p in paths}
    ours = {ROOT / name for name in tracked} or set(paths)  # a reward of the user's own may lie at the root
    return {name: ast.parse(p.read_text()) for p, name in names.items() if p in ours}


TREES = modules()


def layer(module: str) -> str:
    top = module.split(".")[0]
    return top if top in LAYERS and module not in ENTRIES else "scripts"


def home(package: str, name: str) -> str | None:
    """The module that `package.name` is from: itself, or the one that the package takes the name from."""
    if f"{package}.{name}" in TREES:
        return f"{package}.{name}"
    value = getattr(importlib.import_module(package), name, None)
    found = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", package)
    return found if found in TREES else package


def imports(module: str) -> set[str]:
    """Our modules that a module imports, inside functions too, or reaches through a package that loads them late."""
    tree, found, packages = TREES[module], set(), {}
    skipped = {n for node in ast.walk(tree) if is_for_types(node) for n in ast.walk(node)}
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            for alias in node.names:
                found.add(alias.name)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"  # bench/ is a folder of modules without a file of its own
                target = home(node.module, alias.name) if node.module in TREES else node.module
                target = whole if whole in TREES else target
                found.add(target)
                if f"{node.module}.{alias.name}" in TREES:
                    packages[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in packages:
            found.add(home(packages[node.value.id], node.attr))
    return {name for name in found if name in TREES} - {module}


def is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


GRAPH = {module: imports(module) for module in TREES}


def test_the_graph_sees_late_and_inner_imports():
    assert "upt.stages.steps" in GRAPH["train_upt"] and "upt.data.mixture" in GRAPH["train_upt"]
    assert "train_upt" in GRAPH["ablate"] and "kernels.logprob_triton" in GRAPH["kernels.logprob"]


def test_imports_are_spelled_out_and_reach_for_no_test():
    for module, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{module}: a relative import, which the other tests here do not follow"
                assert node.module.split(".")[0] not in ("tests", "conftest"), f"{module} imports {node.module}"


def test_no_import_goes_upwards():
    up = [
        f"{module} imports {other}"
        for module, others in GRAPH.items()
        for other in sorted(others)
        if LAYERS.index(layer(other)) > LAYERS.index(layer(module))
    ]
    assert not up, up


def test_no_circles():
    # A package's own file only says where its names are.
    graph = {m: {o for o in others if o not in packages_of(m)} for m, others in GRAPH.items()}
    assert circle(graph) == [] and circle({"a": {"b"}, "b": {"a"}}) in (["a", "b", "a"], ["b", "a", "b"])


def circle(graph: dict[str, set[str]]) -> list[str]:
    """The modules of one circle of imports, the first of them again at the end; [] where there is none."""
    try:
        [*TopologicalSorter(graph).static_order()]
    except CycleError as error:
        return error.args[1]
    return []


def packages_of(module: str) -> set[str]:
    parts = module.split(".")
    return {".".join(parts[:i]) for i in range(1, len(parts))}


def test_no_private_names_across_files():
    taken = [
        f"{module}: {node.module}.{alias.name}"
        for module, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in {m.split(".")[0] for m in TREES}
        for alias in node.names
        if alias.name.startswith("_") and not alias.name.startswith("__")
    ]
    assert not taken, taken


@pytest.mark.parametrize("module", [m for m in TREES if layer(m) == "scripts" and not m.startswith("bench")])
def test_importing_a_script_does_nothing_and_loads_nothing_heavy(module):
    code = f"import sys, {module}; print(sorted({HEAVY!r} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")
