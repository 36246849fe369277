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
from pydantic import BaseModel, Field, TypeAdapter

from ..errors import ConfigError, EvaluationError
from ..files import first_line, reading, regular
from .metrics import Array, Estimate, Sample, SharedMeans

BASE = -1  # among indices of experts
WORDINGS = ("new", "known", "unseen")
OWN = "own expert"  # the one that is named after the task
TEXTS = ["prompt", "task", "wording"]
READ = (*TEXTS, "embedding", "score", "choice")
Cells = Annotated[int, Ge(1), Le(5 * 10**7)]  # numbers in a file, or its bytes
RANDOM = ", random LoRAs"  # ends a line's name, and the next
RUN = ", run"


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
        scores = {}
        for name, column in self.columns.items():
            if name.startswith("choice/"):
                scores[name.removeprefix("choice/")] = column
        return scores

    def prompts(self) -> Iterator[Prompt]:
        """What rules may know of each prompt."""
        routers = self.routers
        embeddings = self.columns.get("embedding")
        for index, digest in enumerate(self.columns["prompt"]):
            scores = {}
            for router, rows in routers.items():
                scores[router] = dict(zip(self.experts, rows[index].tolist(), strict=True))
            embedding = None if embeddings is None else embeddings[index]
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
    marks = []
    for path in sorted(Path(place).glob("*.parquet")) or [Path(place)]:
        with reading(path, EvaluationError, " A clone has some: research/marks."):
            marks.append(_read(path, parquet))
    return marks


def _read(path: Path, parquet: Any) -> Marks:
    metadata = parquet.read_metadata(regular(path))
    schema = metadata.schema.to_arrow_schema()
    about = _About.model_validate_json(schema.metadata[b"phatgoose"])
    experts = about.experts
    needed = [*TEXTS, "score/base", *(f"score/expert/{name}" for name in experts)]
    others = [name for name in schema.names if name.partition("/")[0] in READ]
    names = list(dict.fromkeys([*needed, *others]))
    TypeAdapter(Cells).validate_python(_cells(metadata))
    table = parquet.read_table(path, columns=names, read_dictionary=TEXTS)
    columns = {name: _values(name, table[name], len(experts)) for name in names}
    packed = base64.b64decode(schema.metadata.get(b"centres", b""))
    owners = np.array(about.owners)
    rows = np.frombuffer(packed, np.float16).reshape(len(owners), -1).astype(np.float32)
    centres = {name: rows[owners == index] for index, name in enumerate(experts)}
    return Marks(about.base, experts, columns, centres)


def _cells(metadata: Any) -> int:
    """The numbers in all columns, or their bytes if these are more, by what a file says."""
    if not metadata.num_rows:
        return 0
    numbers = 0
    unpacked = 0
    for index in range(metadata.num_row_groups):
        group = metadata.row_group(index)
        unpacked += group.total_byte_size
        numbers += sum(group.column(column).num_values for column in range(group.num_columns))
    return max(numbers, unpacked)


def _values(name: str, column: Any, experts: int) -> Array:
    """A column's texts [rows], numbers [rows], or rows of numbers [rows, columns]."""
    cells = column.combine_chunks()
    is_odd = column.null_count > 0
    if name in TEXTS:  # one object for all that are alike: a text of 1 MB may stand in all rows
        values = np.asarray(cells.dictionary.to_numpy(zero_copy_only=False)[cells.indices])
        is_odd |= name == "wording" and not set(values) <= set(WORDINGS)
    elif name.startswith("score/"):
        values = cells.to_numpy(zero_copy_only=False).astype(np.float32)
        is_odd |= not np.isfinite(values).all()
    else:
        width = experts if name.partition("/")[0] == "choice" else -1
        flat = cells.flatten().to_numpy(zero_copy_only=False)
        values = flat.reshape(len(cells), width).astype(np.float32)
    if is_odd:
        raise ValueError(f"column {name} has empty or unknown cells")
    return values


def router_rule(router: str) -> Rule:
    """The first choice of a prompt router whose scores the marks hold."""

    def best(prompt: Prompt) -> str:
        scores = prompt.scores[router]
        return max(scores, key=scores.__getitem__)

    return best


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
    indices: dict[str | None, int] = {name: index for index, name in enumerate(marks.experts)}
    indices[None] = BASE
    routers = ", ".join(marks.routers) or "no router"
    contents = f"experts {', '.join(marks.experts)}, scores of {routers}"
    if "embedding" not in marks.columns:
        contents += ", no embeddings"
    chosen = []
    for prompt in marks.prompts():
        with _users_code(f"The rule failed on prompt {prompt.hash} (these marks have {contents})"):
            chosen.append(indices[rule(prompt)])
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
    wordings = set(marks.columns["wording"])
    return [_replayed(marks, rules, wording) for wording in WORDINGS if wording in wordings]


def _replayed(marks: Marks, rules: Mapping[str, Array], wording: str) -> Replay:
    examples = np.flatnonzero(marks.columns["wording"] == wording)
    tasks = marks.columns["task"][examples]
    choices = {name: chosen[examples] for name, chosen in rules.items()}
    namesakes = None  # the experts named after the tasks, if all tasks have one
    if set(tasks) <= set(marks.experts):
        namesakes = np.array(list(map(marks.experts.index, tasks)))
    rows = _rows(marks, examples, choices, namesakes)
    of_task = [tasks == task for task in dict.fromkeys(tasks)]
    samples = {}
    for name, scores in rows.items():
        statistics = [scores[alike, None].astype(float) for alike in of_task]
        # Any metric that is a mean.
        samples[name] = [Sample(("exact-match",), (column,)) for column in statistics]
    means = SharedMeans.of(samples)

    def line(name: str) -> Line:
        twin = name + RANDOM
        kept = None
        if OWN in rows and means.drawn[OWN].all():
            shares = means.drawn[name] / means.drawn[OWN]
            kept = Estimate.of(means.value[name] / means.value[OWN], shares)
        hits = None
        if OWN in rows and name in choices:
            hits = float((choices[name] == namesakes).mean())
        return Line(
            name,
            score=means.estimate(name),
            gain=means.gain(name, "base"),
            over_random=means.gain(name, twin) if twin in rows else None,
            kept=kept,
            own=hits,
        )

    return Replay(marks.base, wording, len(of_task), len(examples), tuple(map(line, rows)))


def _rows(
    marks: Marks, examples: Array, choices: Mapping[str, Array], namesakes: Array | None
) -> dict[str, Array]:
    """The scores of each line, [examples]."""
    tasks = marks.columns["task"][examples]
    base = marks.columns["score/base"][examples, None]
    alone = np.concatenate([marks.alone("expert")[examples], base], axis=1)  # BASE is the last
    experts = alone[:, :-1]
    best = np.zeros(len(examples), int)
    for task in set(tasks):
        alike = tasks == task
        best[alike] = experts[alike].mean(axis=0).argmax()
    numbers = np.arange(len(examples))
    rows = {
        "base": base[:, 0],
        "random expert": experts.mean(axis=1),
        "oracle*": alone[numbers, best],
    }
    if namesakes is not None:
        rows[OWN] = alone[numbers, namesakes]
    for name, scores in marks.columns.items():
        if name.startswith("score/routed/"):
            rows[name.removeprefix("score/routed/") + RUN] = scores[examples]
    has_random = all(f"score/random/{name}" in marks.columns for name in marks.experts)
    for name, chosen in choices.items():
        rows[name] = alone[numbers, chosen]
        if has_random:
            random = np.concatenate([marks.alone("random")[examples], base], axis=1)
            rows[name + RANDOM] = random[numbers, chosen]
    return rows
