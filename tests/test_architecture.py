"""The shape of the source: layers, sizes, names and docstrings, read from its syntax trees."""

from __future__ import annotations

import ast
import graphlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import phatgoose
from phatgoose.base import loading

SOURCE = Path(phatgoose.__file__).parent

# A module imports from its own entry and from those before it, wherever the import stands.
ORDER = ("errors", "config", "files", "base", "tasks", "experts", "jobs")
ORDER += ("training", "routing", "evaluation", "analysis", "apps", "__main__")

MOST_ENTRIES_OF_A_FOLDER = 14
MOST_LINES_OF_A_FILE = 400
MOST_LINES_OF_A_FUNCTION = 60
ROOT_NAMES = {
    "Expert",
    "Pool",
    "analyse",
    "compare",
    "compose",
    "detach",
    "evaluate",
    "load",
    "load_task",
    "save",
    "train_expert",
    "train_gates",
}

Function = ast.FunctionDef | ast.AsyncFunctionDef


def name_of(path: Path) -> str:
    """A file's dotted name below phatgoose: a package's folder, "phatgoose" for the root."""
    parts = path.relative_to(SOURCE).with_suffix("").parts
    parts = parts[:-1] if parts[-1] == "__init__" else parts
    return ".".join(parts) or "phatgoose"


MODULES = {name_of(path): path for path in sorted(SOURCE.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}
each_module = pytest.mark.parametrize("module", sorted(MODULES))


def absolute(module: str, node: ast.ImportFrom) -> str:
    """The module an import names, without the leading package; "" is the root."""
    if node.level == 0:
        return (node.module or "").removeprefix("phatgoose").lstrip(".")
    package = [] if module == "phatgoose" else module.split(".")
    if MODULES[module].name != "__init__.py":
        package = package[:-1]
    package = package[: len(package) - (node.level - 1)]
    return ".".join([*package, *([node.module] if node.module else [])])


def imports_of(module: str) -> Iterator[tuple[str, int]]:
    """(module of ours that is imported, line), also inside functions."""
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "phatgoose":
                    yield (
                        alias.name.removeprefix("phatgoose").lstrip(".") or "phatgoose",
                        node.lineno,
                    )
        elif isinstance(node, ast.ImportFrom):
            ours = node.level > 0 or (node.module or "").split(".")[0] == "phatgoose"
            origin = absolute(module, node) if ours else ""
            for alias in node.names if ours else ():
                inner = f"{origin}.{alias.name}".lstrip(".")
                yield inner if inner in MODULES else origin or "phatgoose", node.lineno


def functions_of(tree: ast.AST) -> Iterator[Function]:
    return (node for node in ast.walk(tree) if isinstance(node, Function))


def public_things(tree: ast.Module) -> Iterator[Function | ast.ClassDef]:
    """Public functions and classes of a module, and public methods of its public classes."""
    for node in tree.body:
        if isinstance(node, Function | ast.ClassDef) and not node.name.startswith("_"):
            yield node
            for part in node.body if isinstance(node, ast.ClassDef) else ():
                if isinstance(part, Function) and not part.name.startswith("_"):
                    yield part


def calls_of(tree: ast.AST, name: str) -> list[int]:
    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call))
    return [node.lineno for node in calls if getattr(node.func, "id", None) == name]


def test_imports_point_to_the_same_entry_or_one_before_it():
    rank = {"phatgoose": -1, **{entry: place for place, entry in enumerate(ORDER)}}
    for module in set(MODULES) - {"phatgoose"}:
        for imported, line in imports_of(module):
            up = rank[imported.split(".")[0]] <= rank[module.split(".")[0]]
            assert up, f"{MODULES[module]}, line {line}, imports {imported}, which comes later"


def test_routing_does_not_import_training():
    for module in (name for name in MODULES if name.split(".")[0] == "routing"):
        assert not [name for name, _ in imports_of(module) if name.split(".")[0] == "training"]


def entries_of(folder: Path) -> set[str]:
    """What a reader of `folder` sees, without its `__init__`."""
    return {path.name for path in folder.iterdir()} - {"__init__.py", "__pycache__", "py.typed"}


FOLDERS = sorted({path.parent for path in MODULES.values()} - {SOURCE})
each_folder = pytest.mark.parametrize("folder", FOLDERS, ids=lambda p: str(p.relative_to(SOURCE)))


def test_the_root_has_its_twelve_entries():
    names = {name.removesuffix(".py") for name in entries_of(SOURCE)}
    assert names == set(ORDER)
    assert len(names - {"__main__"}) == 12


@each_folder
def test_no_folder_has_too_many_entries(folder):
    assert len(entries_of(folder)) <= MOST_ENTRIES_OF_A_FOLDER


@each_folder
def test_every_folder_says_what_it_is_for_and_lists_its_entries(folder):
    text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8")))
    listed = re.findall(r"^([a-z_0-9]+(?:\.[a-z.*]+|/))", text, re.M)
    wanted = {f"{n}/" if (folder / n).is_dir() else n for n in entries_of(folder)}
    assert len(listed) == len(set(listed))
    assert set(listed) == wanted, "list every file and folder once, in reading order"


def test_the_root_imports_ours_for_type_checkers_only():
    for node in TREES["phatgoose"].body:
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: importing phatgoose must load nothing"


def test_the_search_for_imports_sees_those_inside_functions():
    assert "training.pool_jobs" in {imported for imported, _ in imports_of("apps.cli.experts")}
    assert "phatgoose" in {imported for imported, _ in imports_of("apps.cli.main")}


def test_modules_do_not_import_each_other_in_circles():
    graph = {m: {i for i, _ in imports_of(m)} for m in MODULES if m != "phatgoose"}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"these modules import each other in a circle: {error.args[1]}")


@each_module
def test_terminals_are_the_business_of_apps_alone(module):
    if module.split(".")[0] in {"apps", "__main__"}:
        return
    for node in ast.walk(TREES[module]):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert not {name.split(".")[0] for name in names} & {"typer", "click", "rich"}
    assert calls_of(TREES[module], "print") == []


@each_module
def test_no_file_is_too_long(module):
    lines = len(MODULES[module].read_text(encoding="utf-8").splitlines())
    assert lines <= MOST_LINES_OF_A_FILE, "make it a folder of the same name with the same imports"


@each_module
def test_no_function_is_too_long(module):
    for function in functions_of(TREES[module]):
        body = function.body[1:] if ast.get_docstring(function) else function.body
        lines = function.end_lineno - body[0].lineno + 1 if body else 0
        assert lines <= MOST_LINES_OF_A_FUNCTION, f"{function.name} has {lines} lines"


@each_module
def test_everything_public_has_a_docstring(module):
    assert ast.get_docstring(TREES[module]) or not TREES[module].body
    for thing in public_things(TREES[module]):
        assert ast.get_docstring(thing), f"{module}.{thing.name} (line {thing.lineno})"


@each_module
def test_nothing_is_left_to_assert(module):
    lines = [node.lineno for node in ast.walk(TREES[module]) if isinstance(node, ast.Assert)]
    assert lines == [], "python -O leaves asserts out; raise one of the errors in errors.py"


LOADERS = {"from_pretrained", "from_config", "SentenceTransformer"}  # and HFLM's constructor


@each_module
def test_whatever_loads_a_model_is_told_to_run_no_code_of_its_own(module):
    for node in ast.walk(TREES[module]):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func).rpartition(".")[2]
        if name not in LOADERS and "pretrained" not in {word.arg for word in node.keywords}:
            continue
        given = {word.arg: ast.unparse(word.value) for word in node.keywords}
        told = given.get("trust_remote_code") == "False" or given.get(None) == "NO_CODE"
        assert told, f"{name} in line {node.lineno}: say trust_remote_code=False"


def test_the_settings_that_forbid_code_forbid_it():
    assert loading.NO_CODE == {"trust_remote_code": False}


@each_module
def test_nothing_is_unpickled(module):
    calls = [ast.unparse(n.func) for n in ast.walk(TREES[module]) if isinstance(n, ast.Call)]
    readers = ("torch.load", "pickle.load", "pickle.loads", "joblib.load", "pd.read_pickle")
    assert [call for call in calls if call in readers] == []


@each_module
def test_every_module_exports_what_it_defines(module):
    tree = TREES[module]
    exported: set[str] = set()
    defined: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and any(
            isinstance(target, ast.Name) and target.id == "__all__" for target in node.targets
        ):
            exported |= set(ast.literal_eval(node.value))
    for node in ast.walk(tree):
        if isinstance(node, Function | ast.ClassDef):
            defined.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            defined.add(node.id)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            defined |= {alias.asname or alias.name for alias in node.names}
    assert exported <= defined
    if module != "__main__" and MODULES[module].name != "__init__.py":
        assert exported, "say in __all__ what is public"


def test_no_module_is_a_drawer_for_odds_and_ends():
    drawers = {"util", "utils", "helpers", "common", "misc", "tools"}
    assert not drawers & {part for module in MODULES for part in module.split(".")}


def test_the_root_exports_few_names_and_exactly_these():
    assert set(phatgoose.__all__) == ROOT_NAMES
    assert len(phatgoose.__all__) <= 12
    assert set(dir(phatgoose)) == ROOT_NAMES | {"__version__"}


@pytest.mark.parametrize("name", sorted(ROOT_NAMES))
def test_every_name_of_the_root_resolves_to_a_documented_thing(name):
    thing = getattr(phatgoose, name)
    assert inspect.getdoc(thing)
    assert thing.__name__ == name
    assert name in phatgoose.__doc__


def test_an_unknown_name_of_the_root_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = phatgoose.nothing


def test_the_version_is_that_of_the_project_file():
    project = (SOURCE.parent.parent / "pyproject.toml").read_text(encoding="utf-8")
    assert re.search(r'^version = "(.+)"$', project, re.M).group(1) == phatgoose.__version__


@each_module
def test_errors_are_defined_in_one_place(module):
    classes = (node for node in ast.walk(TREES[module]) if isinstance(node, ast.ClassDef))
    raised = [c.name for c in classes if any("Error" in ast.unparse(b) for b in c.bases)]
    assert module == "errors" or raised == []
