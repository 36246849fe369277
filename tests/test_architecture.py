"""The shape of the source: layers, names, docstrings, read from its trees; sizes: budget.toml."""

from __future__ import annotations

import ast
import graphlib
import inspect
from collections.abc import Iterator
from functools import cache
from importlib.util import resolve_name
from pathlib import Path

import pytest

import phatgoose
from phatgoose import base as loading
from phatgoose import errors

SOURCE = Path(phatgoose.__file__).parent

# A module imports from its own entry and from those before it, wherever the import stands.
ORDER = ("errors", "config", "files", "sites", "base", "passes", "untrusted_text", "tasks")
ORDER += ("experts", "jobs", "training", "routing", "evaluation", "analysis", "apps", "__main__")

ROOT_NAMES = {"Expert", "Pool", "analyse", "compare", "compose", "detach", "evaluate", "load"}
ROOT_NAMES |= {"load_task", "save", "train_expert", "train_gates"}


def name_of(path: Path) -> str:
    """A file's dotted name below phatgoose: a package's folder, "phatgoose" for the root."""
    parts = path.relative_to(SOURCE).with_suffix("").parts
    parts = parts[:-1] if parts[-1] == "__init__" else parts
    return ".".join(parts) or "phatgoose"


MODULES = {name_of(path): path for path in sorted(SOURCE.rglob("*.py"))}


@cache
def tree_of(module: str) -> ast.Module:
    """The syntax tree of a module."""
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


def imports_of(module: str) -> Iterator[tuple[str, int]]:
    """(module of ours that is imported, line), also inside functions."""
    package = "phatgoose" if module == "phatgoose" else f"phatgoose.{module}"
    if MODULES[module].name != "__init__.py":
        package = package.rpartition(".")[0]
    for node in ast.walk(tree_of(module)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            origin = resolve_name("." * node.level + (node.module or ""), package)
            names = [f"{origin}.{alias.name}" for alias in node.names]
        for name in names:
            if name.split(".")[0] == "phatgoose":
                inner = name.removeprefix("phatgoose").lstrip(".")
                yield (
                    (inner if inner in MODULES else inner.rpartition(".")[0]) or "phatgoose",
                    (node.lineno),
                )


def test_imports_point_to_the_same_entry_or_one_before_it():
    rank = {"phatgoose": -1, **{entry: place for place, entry in enumerate(ORDER)}}
    for module in set(MODULES) - {"phatgoose"}:
        for imported, line in imports_of(module):
            up = rank[imported.split(".")[0]] <= rank[module.split(".")[0]]
            assert up, f"{MODULES[module]}, line {line}, imports {imported}, which comes later"


def test_only_applications_import_the_root_and_routing_imports_no_training():
    for module in MODULES:
        room = module.split(".")[0]
        imported = {name.split(".")[0] for name, _ in imports_of(module)}
        assert "phatgoose" not in imported or room in {"apps", "__main__"}, module
        assert "training" not in imported or room != "routing", module


def test_the_root_imports_ours_for_type_checkers_only():
    for node in tree_of("phatgoose").body:
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: importing phatgoose must load nothing"


def test_modules_do_not_import_each_other_in_circles():
    graph = {m: {i for i, _ in imports_of(m)} for m in MODULES if m != "phatgoose"}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"these modules import each other in a circle: {error.args[1]}")


# Each rule yields what breaks it in a module.


def no_terminal(module: str) -> Iterator[str]:
    """Terminals are the business of apps alone."""
    if module.split(".")[0] in {"apps", "__main__"}:
        return
    for node in ast.walk(tree_of(module)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        for name in {name.split(".")[0] for name in names} & {"typer", "click", "rich"}:
            yield f"line {node.lineno} imports {name}, which is for apps"
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "print":
            yield f"line {node.lineno} prints, which is for apps"


def no_assert(module: str) -> Iterator[str]:
    """Nothing is left to assert."""
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.Assert):
            yield f"line {node.lineno}: python -O leaves asserts out; raise an error of errors.py"


LOADERS = {"from_pretrained", "from_config", "SentenceTransformer"}  # and HFLM's constructor


def no_code_of_others(module: str) -> Iterator[str]:
    """Whatever loads a model is told to run no code of its own."""
    for node in ast.walk(tree_of(module)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func).rpartition(".")[2]
        if name not in LOADERS and "pretrained" not in {word.arg for word in node.keywords}:
            continue
        given = {word.arg: ast.unparse(word.value) for word in node.keywords}
        if given.get("trust_remote_code") != "False" and given.get(None) != "NO_CODE":
            yield f"{name} in line {node.lineno}: say trust_remote_code=False"


def pickle_uses(tree: ast.AST) -> list[str]:
    """Imports of pickling modules and calls that unpickle."""
    found = []
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Attribute):
            names = [ast.unparse(node)]
        pickling = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
        loaders = {"torch.load", "torch.save", "numpy.load", "np.load"}
        loaders |= {"pandas.read_pickle", "pd.read_pickle"}
        found += [n for n in names if n.split(".")[0] in pickling or n in loaders]
    return found


def nothing_unpickled(module: str) -> Iterator[str]:
    """Nothing is ever unpickled."""
    for use in pickle_uses(tree_of(module)):
        yield f"{use} runs code that a file may hold"


RULES = (no_terminal, no_assert, no_code_of_others, nothing_unpickled)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_module_keeps_all_rules(module):
    complaints = [complaint for rule in RULES for complaint in rule(module)]
    assert not complaints, "; ".join(complaints)


def test_errors_are_one_tree_and_loading_runs_no_code():
    classes = [thing for thing in vars(errors).values() if isinstance(thing, type)]
    assert all(issubclass(thing, errors.PhatgooseError) for thing in classes)
    assert loading.NO_CODE == {"trust_remote_code": False}


def test_the_root_exports_few_names_and_exactly_these():
    assert set(phatgoose.__all__) == ROOT_NAMES
    assert len(phatgoose.__all__) <= 12
    assert set(dir(phatgoose)) == ROOT_NAMES | {"__version__"}


@pytest.mark.parametrize("name", sorted(ROOT_NAMES))
def test_every_name_of_the_root_resolves_to_a_documented_thing(name):
    thing = getattr(phatgoose, name)
    assert inspect.getdoc(thing)
    members = vars(thing).items() if isinstance(thing, type) else ()
    assert not [n for n, each in members if n[0] != "_" and callable(each) and not each.__doc__]
    assert thing.__name__ == name
    assert name in phatgoose.__doc__


def test_an_unknown_name_of_the_root_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = phatgoose.nothing
