"""Replay: a rule that chooses one expert for each prompt, scored by marks, without a model.

Marks say how every expert alone answered every example (docs/comparing.md has their columns), so
the score of such a rule is known exactly.
"""

from __future__ import annotations

import base64
import importlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from annotated_types import Ge, Le
from numpy.typing import NDArray
from pydantic import BaseModel, Field, TypeAdapter

from ..errors import ConfigError, EvaluationError
from ..files import first_line, reading, regular
from .metrics import Estimate, Sample, SharedMeans

Array = NDArray[Any]
BASE = -1  # among indices of experts
WORDINGS = ("new", "known", "unseen")
OWN = "own expert"  # the one that is named after the task
TEXTS = ["prompt", "task", "wording"]
READ = (*TEXTS, "embedding", "score", "choice")
Cells = Annotated[int, Ge(1), Le(5 * 10**7)]  # numbers in a file, or its bytes
RANDOM, RUN = ", random LoRAs", ", run"  # end names of lines


@dataclass(frozen=True)
class Prompt:
    """What a rule may know of a prompt; neither its task nor its answer.

    `hash` begins the SHA-256 of its text, `embedding` [columns] is None where there is none,
    `scores` are prompt routers' by router and expert, `centres` [clusters, columns] of each
    expert's training inputs are embeddings too.
    """

    hash: str
    embedding: Array | None
    scores: Mapping[str, Mapping[str, float]]
    centres: Mapping[str, Array]


Rule = Callable[[Prompt], str | None]  # an expert, or the base


@dataclass(frozen=True)
class Marks:
    """The marks of one base and its experts: `columns` by name, each [examples] or longer."""

    base: str
    experts: tuple[str, ...]
    columns: Mapping[str, Array]
    centres: Mapping[str, Array]

    def alone(self, kind: str) -> Array:
        """The scores of each expert ("expert") or its random twin ("random"), [examples, E]."""
        return np.stack([self.columns[f"score/{kind}/{name}"] for name in self.experts], axis=1)

    @property
    def routers(self) -> dict[str, Array]:
        """The scores of prompt routers, [examples, E]."""
        return {n.partition("/")[2]: v for n, v in self.columns.items() if n[:7] == "choice/"}

    def prompts(self) -> Iterator[Prompt]:
        """What rules may know of each prompt."""
        routers, embeddings = self.routers, self.columns.get("embedding")
        for i, digest in enumerate(self.columns["prompt"]):
            scores = {
                router: dict(zip(self.experts, rows[i].tolist(), strict=True))
                for router, rows in routers.items()
            }
            embedding = None if embeddings is None else embeddings[i]
            yield Prompt(str(digest), embedding, scores, self.centres)


class _About(BaseModel):
    """What a file says of itself; `owners` number the experts of its centres."""

    format: Literal[1]
    base: str
    experts: tuple[str, ...] = Field(min_length=1)
    owners: list[int] = [BASE]


def read_marks(place: str | Path) -> list[Marks]:
    """The marks in a Parquet file, or in every one of a folder. Raises EvaluationError."""
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise ConfigError("Marks need pyarrow: pip install 'phatgoose[replay]'.") from error
    marks: list[Marks] = []
    for path in sorted(Path(place).glob("*.parquet")) or [Path(place)]:
        with reading(path, EvaluationError, " A clone has some: research/marks."):
            marks.append(_read(path, parquet))
    return marks


def _read(path: Path, parquet: Any) -> Marks:
    size = parquet.read_metadata(regular(path))
    schema = size.schema.to_arrow_schema()
    about = _About.model_validate_json(schema.metadata[b"phatgoose"])
    experts, owners = about.experts, np.array(about.owners)
    needed = [*TEXTS, "score/base", *(f"score/expert/{name}" for name in experts)]
    others = [name for name in schema.names if name.partition("/")[0] in READ]
    names = list(dict.fromkeys([*needed, *others]))
    TypeAdapter(Cells).validate_python(_cells(size))
    table = parquet.read_table(path, columns=names, read_dictionary=TEXTS)
    columns = {name: _values(name, table[name], len(experts)) for name in names}
    flat = np.frombuffer(base64.b64decode(schema.metadata.get(b"centres", b"")), np.float16)
    rows = flat.reshape(len(owners), -1).astype(np.float32)
    centres = {name: rows[owners == z] for z, name in enumerate(experts)}
    return Marks(about.base, experts, columns, centres)


def _cells(size: Any) -> int:
    """The numbers in all columns, or their bytes if these are more, by what a file says."""
    groups = [size.row_group(i) for i in range(size.num_row_groups)]
    numbers = (group.column(j).num_values for group in groups for j in range(group.num_columns))
    unpacked = sum(group.total_byte_size for group in groups)
    return max(sum(numbers), unpacked) if size.num_rows else 0


def _values(name: str, column: Any, experts: int) -> Array:
    """A column's texts [rows], numbers [rows], or rows of numbers [rows, columns]."""
    cells = column.combine_chunks()
    is_text, is_score = name in TEXTS, name.startswith("score/")
    if is_text:  # one object for all that are alike: a text of 1 MB may stand in all rows
        values = np.asarray(cells.dictionary.to_numpy(zero_copy_only=False)[cells.indices])
    else:
        flat = (cells if is_score else cells.flatten()).to_numpy(zero_copy_only=False)
        width = {"score": (), "choice": (experts,)}.get(name.partition("/")[0], (-1,))
        values = flat.reshape(len(cells), *width).astype(np.float32)
    is_odd = name == "wording" and set(values) - set(WORDINGS)
    if is_odd or column.null_count or (is_score and not np.isfinite(values).all()):
        raise ValueError(f"column {name} has empty or unknown cells")
    return np.asarray(values)


def router_rule(router: str) -> Rule:
    """The first choice of a prompt router whose scores the marks hold."""
    return lambda prompt: max(prompt.scores[router], key=prompt.scores[router].__getitem__)


def imported_rule(name: str) -> Rule:
    """The function that "package.module:function" names, from the working folder or installed."""
    module, _, function = name.partition(":")
    here = os.getcwd()
    sys.path.insert(0, here)  # a console script's own path lacks it
    try:
        with _users_code(f"Rule {name} can't be imported; wanted package.module:function"):
            rule: Rule = getattr(importlib.import_module(module), function)
    finally:
        sys.path.remove(here)  # the module may have put others before it
    return rule


@contextmanager
def _users_code(what: str) -> Iterator[None]:
    try:
        yield
    except (Exception, SystemExit) as error:
        raise ConfigError(f"{what}: {first_line(error)}.") from error


def chosen_by(marks: Marks, rule: Rule) -> Array:
    """The index of the expert that `rule` chooses for each prompt, [examples]; BASE for the base.

    Raises ConfigError for an unknown expert and when `rule` fails.
    """
    place: dict[Any, int] = {None: BASE, **{name: z for z, name in enumerate(marks.experts)}}
    named, routers = ", ".join(marks.experts), ", ".join(marks.routers) or "no router"
    known = f"experts {named}, scores of {routers}"
    chosen = list[int]()
    for prompt in marks.prompts():
        has = known if prompt.embedding is not None else f"{known}, no embeddings"
        with _users_code(f"The rule failed on prompt {prompt.hash} (these marks have {has})"):
            chosen.append(place[rule(prompt)])
    return np.array(chosen)


@dataclass(frozen=True)
class Line:
    """One model or rule on the tasks of one wording.

    `score` is the mean over tasks, `gain` that less the base's, in pairs, `over_random` that less
    the same choices' with random LoRAs, if there are marks of these. `kept` is its share of the
    own experts' mean, None where that is 0 in a resample; `own` is the share of prompts for which
    the own expert was chosen.
    """

    name: str
    score: Estimate
    gain: Estimate
    over_random: Estimate | None
    kept: Estimate | None
    own: float | None


@dataclass(frozen=True)
class Replay:
    """The lines of one base and wording. Intervals resample tasks and, within each, examples."""

    base: str
    wording: str
    tasks: int
    examples: int
    lines: tuple[Line, ...]


def replay(marks: Marks, rules: Mapping[str, Array]) -> list[Replay]:
    """The scores of `rules`, experts' indices [examples] by name, beside what bounds them."""
    wordings = marks.columns["wording"]
    return [_replayed(marks, rules, each) for each in WORDINGS if (wordings == each).any()]


def _replayed(marks: Marks, rules: Mapping[str, Array], wording: str) -> Replay:
    asked = np.flatnonzero(marks.columns["wording"] == wording)
    tasks = marks.columns["task"][asked]
    choices = {name: chosen[asked] for name, chosen in rules.items()}
    own = None  # the own experts' indices, if all tasks have some
    if set(tasks) <= set(marks.experts):
        own = np.array([marks.experts.index(task) for task in tasks])
    rows = _rows(marks, asked, choices, own)
    alike = [tasks == task for task in dict.fromkeys(tasks)]
    means = SharedMeans.of(
        {  # any metric that is a mean
            name: [Sample(("exact-match",), (scores[some, None].astype(float),)) for some in alike]
            for name, scores in rows.items()
        }
    )

    def line(name: str) -> Line:
        kept, twin = None, name + RANDOM
        if OWN in rows and means.drawn[OWN].all():
            shares = means.drawn[name] / means.drawn[OWN]
            kept = Estimate.of(means.value[name] / means.value[OWN], shares)
        return Line(
            name,
            score=means.estimate(name),
            gain=means.gain(name, "base"),
            over_random=means.gain(name, twin) if twin in rows else None,
            kept=kept,
            own=float((choices[name] == own).mean()) if OWN in rows and name in choices else None,
        )

    return Replay(marks.base, wording, len(alike), len(asked), tuple(map(line, rows)))


def _rows(
    marks: Marks, asked: Array, choices: Mapping[str, Array], own: Array | None
) -> dict[str, Array]:
    """The scores of each line, [asked]."""
    tasks, base = marks.columns["task"][asked], marks.columns["score/base"][asked, None]
    alone = np.concatenate([marks.alone("expert")[asked], base], axis=1)  # BASE is the last
    every, best = np.arange(len(asked)), np.zeros(len(asked), int)
    for task in set(tasks):
        best[tasks == task] = alone[tasks == task, :-1].mean(axis=0).argmax()
    rows = {"base": base[:, 0], "random expert": alone[:, :-1].mean(axis=1)}
    rows["oracle*"] = alone[every, best]
    if own is not None:
        rows[OWN] = alone[every, own]
    routed = [name for name in marks.columns if name.startswith("score/routed/")]
    rows |= {name.partition("/routed/")[2] + RUN: marks.columns[name][asked] for name in routed}
    has_random = all(f"score/random/{name}" in marks.columns for name in marks.experts)
    for name, chosen in choices.items():
        rows[name] = alone[every, chosen]
        if has_random:
            random = np.concatenate([marks.alone("random")[asked], base], axis=1)
            rows[name + RANDOM] = random[every, chosen]
    return rows
