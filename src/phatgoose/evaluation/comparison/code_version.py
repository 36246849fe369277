"""The version of the code that decides what a score is: results of another version are outdated.

It is a hash of definitions, wherever they stand. Finished results stay valid when files are moved,
split or joined, and when comments, docstrings or layout change.
"""

from __future__ import annotations

import ast
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

from ...routing.routers.registry import ROUTERS

__all__ = ["code_version"]

PACKAGE = Path(__file__).parents[2]
HOMES = [spec.home.rpartition(".")[0] for spec in ROUTERS.values() if isinstance(spec.home, str)]
SCORING = (  # these, and all that they import; the registry imports routers by name
    "evaluation.evaluate",
    "routing.open_model",
    *(f"routing.routers.{home}" for home in HOMES),
)
RELEASE = re.compile(r'^__version__ = "(.+)"$', re.MULTILINE)  # read: the root imports this module
KERNEL = PACKAGE / "routing" / "kernels" / "native.cpp"


@cache
def code_version() -> str:
    """The release and a hash of all definitions that decide what a score is.

    They are the statements at the top of the scoring modules and of every module that these
    import, without imports of our own and `__all__`, each once and in no order; and the source of
    the native kernel.
    """
    definitions = {
        text for module in _imported_by(SCORING) for text in _contents(module).definitions
    }
    digest = hashlib.sha256()
    for definition in sorted(definitions):
        digest.update(definition.encode())
    digest.update(KERNEL.read_bytes())
    (release,) = RELEASE.findall((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    return f"{release}+{digest.hexdigest()[:12]}"


def _imported_by(modules: tuple[str, ...]) -> set[str]:
    """`modules` and every module of this package that they import, by dotted name."""
    found: set[str] = set()
    waiting = list(modules)
    while waiting:
        module = waiting.pop()
        if module not in found:
            found.add(module)
            waiting.extend(_imports(module))
    return found


def _imports(module: str) -> Iterator[str]:
    package = module.split(".")
    if _file(module).name != "__init__.py":
        package = package[:-1]
    for level, source, names in _contents(module).imports:
        above = package[: len(package) - level + 1]
        origin = ".".join([*above, *([source] if source else [])])
        for name in (origin, *(f"{origin}.{each}".lstrip(".") for each in names)):
            if name and _file(name).is_file():
                yield name


@dataclass(frozen=True)
class _Contents:
    """What a file says: `imports` of our own as (level, module, names), and its `definitions`.

    Definitions are the statements at its top, as text that no move changes.
    """

    imports: tuple[tuple[int, str | None, tuple[str, ...]], ...]
    definitions: tuple[str, ...]


def _contents(module: str) -> _Contents:
    return _contents_of(_file(module).read_text(encoding="utf-8"))


@lru_cache(maxsize=1024)
def _contents_of(text: str) -> _Contents:
    tree = ast.parse(text)
    imports = tuple(
        (node.level, node.module, tuple(alias.name for alias in node.names))
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level
    )
    return _Contents(imports, tuple(map(ast.dump, _Essence().visit(tree).body)))


class _Essence(ast.NodeTransformer):
    """Removes what doesn't decide a score: docstrings, imports of our own and `__all__`."""

    def generic_visit(self, node: ast.AST) -> ast.AST:
        documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
        if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:]
        return super().generic_visit(node)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.ImportFrom | None:
        return None if node.level else node

    def visit_If(self, node: ast.If) -> ast.AST | None:
        return None if ast.unparse(node.test) == "TYPE_CHECKING" else self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> ast.AST | None:
        return None if ast.unparse(node.targets[0]) == "__all__" else self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> ast.AST | None:
        return None if ast.unparse(node.target) == "__all__" else self.generic_visit(node)


def _file(module: str) -> Path:
    place = PACKAGE.joinpath(*module.split("."))
    package = place / "__init__.py"
    return package if package.is_file() else place.with_suffix(".py")
