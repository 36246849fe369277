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
from phatgoose import bases, errors

SOURCE = Path(phatgoose.__file__).parent

# Top to bottom: a module may import from layers above its own only, wherever the import stands.
LAYERS = (
    ("phatgoose",),  # the root holds the version; its lazy names are looked up when used
    ("errors",),
    ("kernels.building", "kernels.sizes"),
    (
        "config",
        "files",
        "processes",
        "kernels.concat",
        "kernels.gather",
        "kernels.grouped",
        "kernels.mixed",
        "kernels.reference",
        "kernels.rows",
        "left_overs",
        "kernels.triton_programs",
        "metrics",
        "modules",
        "offloading",
        "reading",
        "rows",
        "speeds",
    ),
    (
        "bases",
        "bootstrap",
        "cuts",
        "formats",
        "kernels.bottlenecks",
        "kernels.native",
        "kernels.triton_gpu",
        "mapped",
        "patterns",
        "positions",
        "recipes",
        "refusals",
        "results",
        "scores",
        "sites",
        "tasks",
    ),
    ("placement", "stacks", "token_masks"),
    ("adapters", "card", "embeddings", "kernels", "shapes", "soundness", "suites.entries", "work"),
    (
        "bottleneck",
        "encoding",
        "packing",
        "skeletons",
        "suites.hub",
        "suites.local",
        "suites.promptsource",
        "tables",
    ),
    ("collating", "conversion", "kinds", "suites.bigbench", "suites.t0"),
    ("alone", "expert", "fitting", "likelihood", "recording", "suites.flan"),
    ("description", "expert_folder", "hub"),
    ("packed",),
    ("jobs", "pool", "prediction", "statistics", "suites"),
    ("duplicates", "gates", "importing", "routers.decision", "suites.sources"),
    (
        "fresh",
        "layers",
        "planning",
        "routers.arrow",
        "routers.lookup",
        "routers.scored",
        "routers.unscored",
    ),
    ("mixed", "training"),
    ("routers.affinities", "routers.stand_in"),
    ("routers.voting",),
    ("pool_training", "routers", "schedules", "trial"),
    ("composition",),
    ("saving",),
    ("routed",),
    ("growing", "storage", "evaluation"),
    ("opening", "segments"),
    ("methods",),
    ("cells",),
    (
        "analysis.agreement",
        "analysis.measures",
        "analysis.importance",
        "analysis.places",
        "analysis.pool_sizes",
        "comparison",
    ),
    ("analysis.reading", "analysis.tally"),
    ("analysis.findings", "analysis.traces"),
    ("analysis.results",),
    ("analysis.analysing",),
    ("analysis",),
    ("apps", "apps.cluster.connection", "apps.consoles", "apps.demo_tasks.drawing"),
    ("apps.cluster.worker",),
    ("apps.cluster.engine",),
    (
        "apps.demo_tasks.arithmetic",
        "apps.demo_tasks.category",
        "apps.demo_tasks.entailment",
        "apps.demo_tasks.ordering",
        "apps.demo_tasks.sentiment",
    ),
    (
        "apps.comparison_tables",
        "apps.cluster",
        "apps.demo_tasks",
        "apps.analysis_tables",
        "apps.figures",
        "apps.generation",
        "apps.harness",
        "apps.report.assets",
        "apps.server.caches",
        "apps.server.connections",
        "apps.server.decoding",
        "apps.server.protocol",
        "apps.server.refusals",
        "apps.server.replies",
        "apps.server.settings",
        "apps.server.texts",
    ),
    (
        "apps.server.doors",
        "apps.server.metrics",
        "apps.server.page",
        "apps.server.parsing",
        "apps.server.rows",
        "apps.server.running",
        "apps.server.schema",
    ),
    ("apps.server.bodies", "apps.server.runner"),
    (
        "apps.server.prefill",
        "apps.server.prompts",
        "apps.server.turns",
        "apps.server.variants",
    ),
    ("apps.server.answers", "apps.server.batches", "apps.server.composing"),
    ("apps.server.engine",),
    ("apps.server.jobs",),
    ("apps.server.service",),
    ("apps.server.app",),
    ("apps.server",),
    ("apps.cluster.replicas",),
    (
        "apps.explanation",
        "apps.report.contents",
        "apps.cli.flags",
        "apps.cli.plan",
        "apps.cli.engines",
    ),
    ("apps.report.page", "apps.cli.experts", "apps.cli.segments"),
    ("apps.report",),
    ("apps.demo",),
    ("apps.cli.comparison", "apps.cli.routed", "apps.cli.sharing"),
    ("apps.cli.analysis", "apps.cli.serving"),
    ("apps.cli.main",),
    ("apps.cli",),
    ("__main__",),
)
RANK = {module: rank for rank, layer in enumerate(LAYERS) for module in layer}

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


def test_every_module_has_a_layer_and_every_layer_its_modules():
    assert set(RANK) == set(MODULES), (
        "LAYERS in tests/test_architecture.py must name every module under src/phatgoose once: put "
        "a new one into the lowest layer below everything it imports, and take out what is gone."
    )
    assert sum(map(len, LAYERS)) == len(RANK)


@each_module
def test_imports_point_to_layers_above_only(module):
    if module == "phatgoose":
        return  # see the test of the root's imports
    for imported, line in imports_of(module):
        assert RANK[imported] < RANK[module], (
            f"{MODULES[module].name}, line {line}: {module} imports {imported}, which stands in "
            f"the same layer or further down. Move what is shared into a layer above both, "
            f"or hand it over as an argument; don't hide the import in a function."
        )


def test_the_root_imports_ours_for_type_checkers_only():
    for node in TREES["phatgoose"].body:
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: importing phatgoose must load nothing"


def test_the_search_for_imports_sees_those_inside_functions():
    assert "pool_training" in {imported for imported, _ in imports_of("apps.cli.experts")}
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
    assert bases.NO_CODE == {"trust_remote_code": False}


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
    if module not in {"__main__", "apps"}:
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


def drawn_tree() -> dict[str, str]:
    """Each error's parent, as errors.py draws them: by indentation."""
    parents: dict[str, str] = {}
    above: list[tuple[int, str]] = []
    for line in errors.__doc__.splitlines():
        found = re.match(r"( *)(?:[+x] )?([A-Z]\w*Error)\b(?:  +\S|$)", line)
        if not found:
            continue
        depth, name = len(found.group(1)), found.group(2)
        above = [(d, n) for d, n in above if d < depth]
        parents[name] = above[-1][1] if above else "Exception"
        above.append((depth, name))
    return parents


def test_the_errors_are_one_tree_and_it_is_drawn_right():
    classes = {name: thing for name, thing in vars(errors).items() if isinstance(thing, type)}
    assert set(classes) == set(errors.__all__)
    assert drawn_tree() == {name: thing.__bases__[0].__name__ for name, thing in classes.items()}
    assert all(issubclass(thing, errors.PhatgooseError) for thing in classes.values())


@each_module
def test_errors_are_defined_in_one_place(module):
    classes = (node for node in ast.walk(TREES[module]) if isinstance(node, ast.ClassDef))
    raised = [c.name for c in classes if any("Error" in ast.unparse(b) for b in c.bases)]
    assert module == "errors" or raised == []
