"""The shape of the source: layers, names, what is never done, read from its trees."""

from __future__ import annotations

import ast
import graphlib
import inspect
from collections.abc import Iterator
from importlib.util import resolve_name
from pathlib import Path

import pytest

import phatgoose
from phatgoose import base as loading
from phatgoose import errors

SOURCE = Path(phatgoose.__file__).parent

# A module imports from its own entry and from those before it, wherever the import stands.
ORDER = ("errors", "config", "files", "names", "sites", "base", "passes", "untrusted_text")
ORDER += (
    "entry_points",
    "tasks",
    "e5",
    "reader",
    "experts",
    "jobs",
    "training",
    "routing",
    "evaluation",
    "analysis",
    "apps",
)
ORDER += ("__main__",)

ROOT_NAMES = {
    "Chooser",
    "Expert",
    "Pool",
    "analyse",
    "compare",
    "compose",
    "detach",
    "evaluate",
    "load",
}
ROOT_NAMES |= {"load_task", "save", "train_expert", "train_gates"}


def name_of(path: Path) -> str:
    """A file's dotted name below phatgoose: a package's folder, "phatgoose" for the root."""
    parts = path.relative_to(SOURCE).with_suffix("").parts
    parts = parts[:-1] if parts[-1] == "__init__" else parts
    return ".".join(parts) or "phatgoose"


MODULES = {name_of(path): path for path in sorted(SOURCE.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}


def imported_in(module: str) -> Iterator[tuple[str, int]]:
    """(what is imported, with its package, and the line), also inside functions."""
    package = "phatgoose" if module == "phatgoose" else f"phatgoose.{module}"
    if MODULES[module].name != "__init__.py":
        package = package.rpartition(".")[0]
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = resolve_name("." * node.level + (node.module or ""), package)
            yield from ((f"{origin}.{alias.name}", node.lineno) for alias in node.names)


def imports_of(module: str) -> Iterator[tuple[str, int]]:
    """(module of ours that is imported, line)."""
    for name, line in imported_in(module):
        if name.split(".")[0] == "phatgoose":
            inner = name.removeprefix("phatgoose").lstrip(".")
            yield (inner if inner in MODULES else inner.rpartition(".")[0]) or "phatgoose", line


def test_imports_point_to_the_same_entry_or_one_before_it():
    """Routing needs no training, and the root is for applications."""
    rank = {entry: place for place, entry in enumerate(ORDER)} | {"phatgoose": ORDER.index("apps")}
    for module in set(MODULES) - {"phatgoose"}:
        room = module.split(".")[0]
        for name, line in imports_of(module):
            imported = name.split(".")[0]
            up = rank[imported] <= rank[room] and (room, imported) != ("routing", "training")
            assert up, f"{MODULES[module]}, line {line}, imports {name}, which comes later"
    for node in TREES["phatgoose"].body:
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: importing phatgoose must load nothing"


def test_modules_do_not_import_each_other_in_circles():
    graph = {m: {i for i, _ in imports_of(m)} for m in MODULES if m != "phatgoose"}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"these modules import each other in a circle: {error.args[1]}")


PICKLING = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
UNPICKLING = {"torch.load", "torch.save", "numpy.load", "np.load"}
UNPICKLING |= {"pandas.read_pickle", "pd.read_pickle"}
LOADERS = {"from_pretrained", "from_config", "SentenceTransformer"}  # and HFLM's constructor


def complaints_about(module: str) -> Iterator[str]:
    """Nothing is unpickled or asserted; no loader runs a model's code; terminals are for apps."""
    used = [*imported_in(module)]
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Attribute):
            used.append((ast.unparse(node), node.lineno))
        elif isinstance(node, ast.Assert):
            yield f"line {node.lineno}: python -O leaves asserts out; raise an error of errors.py"
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func).rpartition(".")[2]
            used.append((called, node.lineno))
            words = {word.arg: ast.unparse(word.value) for word in node.keywords}
            is_told = words.get("trust_remote_code") == "False" or words.get(None) == "NO_CODE"
            if (called in LOADERS or "pretrained" in words) and not is_told:
                yield f"{called} in line {node.lineno}: say trust_remote_code=False"
    is_app = module.split(".")[0] in {"apps", "__main__"}
    for name, line in used:
        if name.split(".")[0] in PICKLING or name in UNPICKLING:
            yield f"line {line}: {name} runs code that a file may hold"
        if name.split(".")[0] in {"typer", "click", "rich", "print"} and not is_app:
            yield f"line {line} uses {name}, which is for apps"


def test_no_module_does_what_is_never_done():
    assert {name: found for name in MODULES if (found := list(complaints_about(name)))} == {}
    assert loading.NO_CODE == {"trust_remote_code": False}


def test_errors_are_one_tree():
    classes = [thing for thing in vars(errors).values() if isinstance(thing, type)]
    assert all(issubclass(thing, errors.PhatgooseError) for thing in classes)


def test_the_root_exports_few_names_and_each_is_documented():
    assert set(phatgoose.__all__) == ROOT_NAMES
    assert set(dir(phatgoose)) == ROOT_NAMES | {"__version__"}
    for name in ROOT_NAMES:
        thing = getattr(phatgoose, name)
        assert inspect.getdoc(thing)
        members = vars(thing).items() if isinstance(thing, type) else ()
        assert not [n for n, each in members if n[0] != "_" and callable(each) and not each.__doc__]
        assert thing.__name__ == name
        assert name in phatgoose.__doc__
