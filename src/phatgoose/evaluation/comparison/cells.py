"""Cells of a comparison: one row on one dataset, with the code and machine that scored it."""

from __future__ import annotations

import ast
import hashlib
import os
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ...base import Base, number_format
from ...errors import EvaluationError
from ...experts.expert import Expert
from ...experts.registry import KINDS
from ...jobs import BaseLocation
from ...routing.composition import asked_of, composition_if_any
from ...routing.open_model import OpenedModel
from ...routing.routers.discriminant import States
from ...routing.routers.registry import ROUTERS
from ...tasks.encoding import Encoder
from ..evaluate import Answer, EvaluationSet, Questions, TaskScore, score, task_score
from .methods import Row

PACKAGE = Path(__file__).parents[2]
KIND_PLACES = [
    place.partition(":")[0].removeprefix("phatgoose.")
    for kind in KINDS.values()
    for place in (kind.module, *kind.parts)
    if isinstance(place, str)
]
SCORING = (  # these, and all that they import; registries import routers and kinds by name
    "evaluation.evaluate",
    "routing.open_model",
    *(
        f"routing.routers{spec.home.rpartition('.')[0]}"
        for spec in ROUTERS.values()
        if isinstance(spec.home, str) and spec.home.startswith(".")
    ),
    *KIND_PLACES,
)
RELEASE = re.compile(r'^__version__ = "(.+)"$', re.MULTILINE)  # read: the root imports this module
KERNEL = PACKAGE / "routing" / "kernels" / "native.cpp"
Import = tuple[int, str | None, tuple[str, ...]]  # level, module, names


@cache
def code_version() -> str:
    """The release and a hash of all definitions that decide what a score is, wherever they are.

    Hashed are the native kernel and the top-level statements of the scoring modules and of all that
    these import, without comments, docstrings and imports of our own, each once and in no order. So
    results stay valid when files are moved, split or joined.
    """
    definitions = {text for module in _imported_by(SCORING) for text in _contents(module)[1]}
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
        if module in found:
            continue
        found.add(module)
        package = module.split(".")
        if _file(module).name != "__init__.py":
            package = package[:-1]
        for level, source, names in _contents(module)[0]:
            origin = ".".join([*package[: len(package) - level + 1], *([source] if source else [])])
            # `from . import x` may name a module, or something inside one.
            possible = (origin, *(f"{origin}.{name}".lstrip(".") for name in names))
            waiting += [name for name in possible if name and _file(name).is_file()]
    return found


def _contents(module: str) -> tuple[tuple[Import, ...], tuple[str, ...]]:
    return _contents_of(_file(module).read_text(encoding="utf-8"))


@lru_cache(maxsize=1024)
def _contents_of(text: str) -> tuple[tuple[Import, ...], tuple[str, ...]]:
    tree = ast.parse(text)
    imports = tuple(
        (node.level, node.module, tuple(alias.name for alias in node.names))
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level
    )
    return imports, tuple(map(ast.dump, _Essence().visit(tree).body))


class _Essence(ast.NodeTransformer):
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


def _file(module: str) -> Path:
    place = PACKAGE.joinpath(*module.split("."))
    package = place / "__init__.py"
    return package if package.is_file() else place.with_suffix(".py")


PROCESSORS = Path("/proc/cpuinfo")
SECONDS = 20  # for git
DIGITS = 9  # of a commit


def circumstances(device: torch.device, results: Path) -> dict[str, str | None]:
    """`date` of the last finished cell (UTC), this package's `commit`, and the `machine`."""
    finished = datetime.fromtimestamp(results.stat().st_mtime, UTC)
    return {
        "date": finished.isoformat(timespec="seconds"),
        "commit": commit_of(PACKAGE),
        "machine": f"{chip_of(device)}, {os.cpu_count()} cores",
    }


def commit_of(folder: Path) -> str | None:
    """The commit of the checkout of `folder`, with "+changes" if its files differ; None if
    installed.
    """
    if not _git(folder, "ls-files", "."):  # no checkout, or one of somebody else's
        return None
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no", ".")
    head = _git(folder, "rev-parse", f"--short={DIGITS}", "HEAD")
    return f"{head}+changes" if head and changed else head


def _git(folder: Path, *words: str) -> str | None:
    git = shutil.which("git")
    if git is None:
        return None
    try:
        done = subprocess.run(
            [git, "-C", str(folder), *words], capture_output=True, timeout=SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode(errors="replace").strip() or None


def chip_of(device: torch.device) -> str:
    """The name of the GPU that `device` is, or of this machine's processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        text = PROCESSORS.read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    names = (line.partition(":")[2].strip() for line in text.splitlines() if "model name" in line)
    return next(names, "") or platform.processor() or platform.machine()


Results = Mapping[str, Mapping[str, Any]]  # by dataset, as they are stored


def answered_by_experts(
    known: Mapping[str, Results],
    model: PreTrainedModel,
    dataset: EvaluationSet,
    questions: Questions,
) -> tuple[TaskScore, list[int]] | None:
    """The score of a routed model that leaves each input to one expert, who has answered it.

    `known` are the single experts' results. Beside the score are the examples with several best
    choices. None for other models, and where an expert's answers aren't known. What differs from
    scoring the model itself is which inputs shared a batch, hence no more than rounding.
    """
    parts = composition_if_any(model)
    # More experts an input are scored by the model, which then reads the inputs itself.
    context = parts.context if parts is not None else None
    if parts is None or context is None or context.router is None or context.router.k > 1:
        return None
    if not known or "task" in parts.router.spec.given:
        return None
    asked = asked_of(parts, questions.prompts, dataset.examples, questions.encoder)
    chosen = context.choose(asked, examples=dataset.examples).lone()
    if chosen is None:
        return None
    names = [parts.experts[z] for z in chosen.tolist()]
    held = {name: known.get(name, {}).get(dataset.name) for name in set(names)}
    if None in held.values():
        return None
    results = [held[name] or {} for name in names]
    texts = [result["answers"][i] for i, result in enumerate(results)]
    tied = [i for i, result in enumerate(results) if i in result["tied"]]
    found = task_score(dataset, [Answer(text) for text in texts])
    return replace(found, ties=len(tied), cuts=questions.cuts), tied


Scorer = Callable[["Cell"], dict[str, Any]]


@dataclass(frozen=True)
class Cell:
    """The job of scoring one row on one dataset; `key` identifies its result in the store."""

    row: str
    dataset: str
    key: Mapping[str, Any]
    size: int = 1

    @property
    def name(self) -> str:
        return f"{self.row} on {self.dataset}"

    @property
    def group(self) -> str:
        return self.row

    def again(self) -> Cell:
        return self


def cell_of(row: Row, dataset: EvaluationSet, base: Base) -> Cell:
    """The cell of `row` on `dataset`; its key says all that its result depends on."""
    key = {
        "base": base.fingerprint,
        "dtype": number_format(base.model),
        "method": dict(row.identity),
        "task": dataset.name,
        "examples": dataset.digest,
        "code": code_version(),
    }
    return Cell(row.name, dataset.name, key)


@dataclass(frozen=True)
class CellWorkshop:
    """Scores cells with a base, from rows and datasets by name.

    One for another process has locations of base and experts, and the version of its `code`.
    """

    base: Base | BaseLocation
    rows: Mapping[str, Row]
    datasets: Mapping[str, EvaluationSet]
    known: Mapping[str, Results] = field(default_factory=dict)
    code: str = ""
    states: States = field(default_factory=dict)  # readings of prompts, which rows share

    @contextmanager
    def open(self, tell: Callable[[int], None]) -> Iterator[Scorer]:
        """A function that scores a cell and returns its result as it is stored.

        Closing the context restores the base. Raises EvaluationError for another version of the
        code.
        """
        base, rows = self._loaded()
        with ExitStack() as composed:
            at: str | None = None
            opened = OpenedModel(base.model, base.tokenizer)
            asked: dict[str, Questions] = {}  # by dataset: all rows of this base are asked these

            def score(cell: Cell) -> dict[str, Any]:
                nonlocal at, opened
                if cell.row != at:
                    at = None
                    composed.close()
                    opened = composed.enter_context(rows[cell.row].model(base))
                    at = cell.row
                    parts = composition_if_any(base.model)
                    if parts is not None and parts.prompt_router is not None:
                        parts.prompt_router.remember(self.states)
                dataset = self.datasets[cell.dataset]
                if opened.model is not base.model:
                    return _score(opened, dataset, _asked(opened, dataset), self.known)
                if dataset.name not in asked:
                    asked[dataset.name] = _asked(opened, dataset)
                return _score(opened, dataset, asked[dataset.name], self.known)

            yield score

    def _loaded(self) -> tuple[Base, Mapping[str, Row]]:
        if not isinstance(self.base, BaseLocation):
            return self.base, self.rows
        if self.code != code_version():
            raise EvaluationError(
                f"A worker runs phatgoose {code_version()}, but the comparison was begun with "
                f"{self.code}; install the same version on all machines."
            )
        experts: dict[str, Expert] = {}
        return self.base.load(), {name: row.loaded(experts) for name, row in self.rows.items()}

    def portable(self) -> CellWorkshop:
        if isinstance(self.base, BaseLocation):
            return self
        rows = {name: row.portable() for name, row in self.rows.items()}
        base = BaseLocation.of(self.base)
        return replace(self, base=base, rows=rows, code=code_version())


def _asked(opened: OpenedModel, dataset: EvaluationSet) -> Questions:
    formatting = dataset.settings.formatting
    return dataset.questions(Encoder.for_model(opened.model, opened.tokenizer, formatting))


def _score(
    opened: OpenedModel,
    dataset: EvaluationSet,
    questions: Questions,
    known: Mapping[str, Results],
) -> dict[str, Any]:
    """The result of one cell, as it is stored: `tied` are examples with several best choices."""
    begun = time.monotonic()
    shared = answered_by_experts(known, opened.model, dataset, questions)
    if shared is not None:
        found, tied = shared
    else:
        found = score(opened.model, dataset, questions)
        tied = [i for i, prediction in enumerate(found.predictions) if prediction.tied]
    rows = found.sample.rows
    return {
        **found.to_dict(),
        **({} if rows is None else {"rows": rows.tolist()}),
        "metrics": list(dataset.metrics),
        "seconds": round(time.monotonic() - begun, 2),
        "answers": [prediction.answer for prediction in found.predictions],
        "tied": tied,
        "marks": [prediction.marks for prediction in found.predictions],
    }
