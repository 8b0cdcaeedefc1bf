"""The import rules of DESIGN.md, section 2, read from the source of the package: imports inside functions and for types
count too, and so does importlib.import_module of a plain string.

Not covered: names built at run time (the registry's), what third-party libraries import.
"""

import ast
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "megatron_agent"

# Of our own package, what a file or folder may import besides itself. The longest key that fits a file holds; files at
# the top that know every stage (train, sft, stages, checkpoints, ...: see the test of rooms) have no entry.
FLOOR = {"types", "errors", "registry", "options", "balance"}
OURS = {
    "types": set(),
    "errors": set(),
    "registry": {"errors"},
    "options": {"errors", "registry"},
    "balance": set(),
    "reaper": set(),
    "data": FLOOR,
    "envs": FLOOR | {"data.images"},
    "rewards": FLOOR | {"envs.functional"},
    "algorithms": FLOOR,
    "models": FLOOR | {"training.layout"},  # the last for types only
    "rollout": FLOOR | {"envs", "rewards", "models.renderer", "data.images"},
    "training": FLOOR | {"algorithms", "models", "data.images"},
    # Entry points of the processes in which weights leave and arrive: a rank's and an engine's worker.
    "training.worker": FLOOR | {"training", "algorithms", "models", "data.images", "weights.sender"},
    "rollout.worker_extension": FLOOR | {"weights.receiver"},
    "weights": FLOOR | {"models.mapping", "training.layout"},
    "observe": {"types", "errors", "data.images"},
    "cluster": {"errors", "config", "data.images", "training.worker", "training.layout", "rollout.engine", "reaper"},
}

# Where a heavy library may be imported at all.
HEAVY = {
    "vllm": {"rollout/engine.py", "weights/receiver.py", "weights/reload.py"},  # the last is the receiver's other half
    "megatron": {"training/", "models/", "weights/sender.py"},
    "ray": {"cluster.py", "training/actor.py", "training/worker.py", "rollout/engine.py", "rollout/pool.py"},
}


def files():
    return sorted(p for p in PACKAGE.rglob("*.py"))


def name_of(path):
    return path.relative_to(PACKAGE).as_posix()


@cache
def tree_of(path):
    return ast.parse(path.read_text(), str(path))


def imports(path):
    """Dotted names; `from a.b import c` gives a.b.c, for c may be a module."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "import_module":
            yield from (a.value for a in node.args if isinstance(a, ast.Constant))


def within(name, prefix):
    return name == prefix or name.startswith(f"{prefix}.")


def rule_of(path):
    parts = name_of(path).removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    fitting = [key for key in OURS if within(parts, key)]
    return max(fitting, key=len) if fitting else None


def cases(select=lambda path: True):
    return [pytest.param(p, id=name_of(p)) for p in files() if select(p)]


@pytest.mark.parametrize("path", cases(rule_of))
def test_a_room_imports_only_what_the_plan_allows(path):
    rule = rule_of(path)
    ours = {name.removeprefix("megatron_agent.") for name in imports(path) if name.startswith("megatron_agent.")}
    allowed = OURS[rule] | {rule}
    assert {name for name in ours if not any(within(name, a) for a in allowed)} == set()


@pytest.mark.parametrize("library", HEAVY)
def test_heavy_libraries_are_imported_in_few_places(library):
    found = {name_of(p) for p in files() if any(within(name, library) for name in imports(p))}
    allowed = HEAVY[library]
    assert {f for f in found if not any(f == a or (a.endswith("/") and f.startswith(a)) for a in allowed)} == set()
    assert found, f"nothing imports {library}: does this test still read the sources?"


def test_every_room_has_a_rule():
    """A new folder or file of the package needs a line in the table, or a place among those that know every stage."""
    know_all = {
        "train",
        "train_async",
        "sft",
        "stages",
        "evaluate",
        "probe",
        "queue_file",
        "report",
        "run_state",
        "checkpoints",
        "sync",
        "cli",
        "config",
    }
    rooms = {p.stem for p in PACKAGE.glob("*.py")} | {p.name for p in PACKAGE.iterdir() if list(p.glob("*.py"))}
    assert rooms <= set(OURS) | know_all | {"__init__", "__main__"}


def test_types_errors_and_registry_stand_alone():
    for name in ("types", "errors", "registry"):
        ours = {n for n in imports(PACKAGE / f"{name}.py") if n.startswith("megatron_agent")}
        assert all(within(n, "megatron_agent.errors") for n in ours) and (name == "registry" or not ours)


@pytest.mark.parametrize("path", [pytest.param(p, id=name_of(p)) for p in files()])
def test_nothing_prints_and_nothing_is_a_utils_file(path):
    calls = [n.lineno for n in ast.walk(tree_of(path)) if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "print"]
    assert calls == [] and path.stem not in ("utils", "util", "helpers", "common")


def test_the_package_does_not_know_tools_examples_or_tests():
    for path in files():
        assert not [n for n in imports(path) if n.split(".")[0] in ("tools", "examples", "tests")], path
        assert not [n for n in imports(path) if within(n, "megatron.training")], f"{path}: Megatron-Core only"
