"""Tasks: examples with an input, a target and perhaps answer choices; mixtures; suites of tasks."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

from ..config import Settings, closest
from ..errors import PhatgooseError, TaskError
from ..files import half_character

VALIDATION_SHARE = 0.1
VALIDATION_MOST = 500
SYSTEM = ("system", "developer")  # roles
SYSTEM_CHARACTERS = 1000  # more is no task's instruction, and would cost as much as the chat
MOST_MESSAGES = 8
T = TypeVar("T")


class Chat(str):
    """An input of several turns, (role, content) each, for the base's chat template.

    As a text it is what the turns say, one after the other.
    """

    turns: tuple[tuple[str, str], ...]

    def __new__(cls, turns: Iterable[tuple[str, str]]) -> Chat:
        pairs = tuple((role, content) for role, content in turns)
        chat = super().__new__(cls, "\n\n".join(content for _, content in pairs))
        chat.turns = pairs
        return chat

    def __getnewargs__(self) -> Any:  # copies and pickles are made of it
        return (self.turns,)

    def __add__(self, suffix: str) -> Chat:
        *before, (role, content) = self.turns
        return Chat([*before, (role, content + suffix)])


def said_in(turns: Iterable[tuple[str, str]]) -> tuple[str, list[str]]:
    """(the first SYSTEM_CHARACTERS of the system prompt, the user's last messages) of a chat.

    The last message stands for a user who says nothing.
    """
    last = ""
    system = []
    messages = []
    for role, text in turns:
        if not text.strip():
            continue
        last = text
        if role in SYSTEM:
            system.append(text)
        elif role == "user":
            messages.append(text)
    return "\n\n".join(system)[:SYSTEM_CHARACTERS], messages[-MOST_MESSAGES:] or [last]


def request_in(text: str) -> str:
    """What is asked in an input: in a chat the user's last message, else all of it."""
    return said_in(text.turns)[1][-1] if isinstance(text, Chat) else text


def check_text(text: str, what: str = "The prompt") -> None:
    """Raise TaskError for an empty text and one with half a character; `what` names it."""
    if not text:
        raise TaskError(f"{what} is empty.")
    half = half_character(text)
    if half is not None:
        raise TaskError(f"{what} holds {half!r}, which is no character; write it in UTF-8.")


@dataclass(frozen=True)
class Example:
    """One example. `choices` is empty for open-ended tasks; `references` are all right answers.

    An `input` that is a `Chat` is read through the base's chat template. `row` numbers the
    dataset's row that it was made of, if others may be made of the same (in other templates), which
    equality ignores.
    """

    input: str
    target: str
    choices: tuple[str, ...] = ()
    references: tuple[str, ...] = ()
    row: int | None = field(default=None, compare=False)

    @property
    def answers(self) -> tuple[str, ...]:
        """Every accepted answer: the references, or the target alone."""
        return self.references or (self.target,)

    @property
    def content(self) -> dict[str, Any]:
        fields = asdict(self)
        if isinstance(self.input, Chat):
            fields["turns"] = self.input.turns
        if self.row is None:
            del fields["row"]
        return fields


@dataclass(frozen=True)
class Task:
    """A named dataset and how it is scored.

    `source` says where the data came from (of a file only its name), `validation_origin` where the
    validation split came from. `metrics` are names in `evaluation.metrics.METRICS`, and the task's
    score is their mean; empty means accuracy if there are choices, exact match otherwise.
    `max_new_tokens` bounds generated answers; None leaves the bound to the evaluation.
    """

    name: str
    train: tuple[Example, ...] = ()
    validation: tuple[Example, ...] = ()
    test: tuple[Example, ...] = ()
    source: str = "memory"
    validation_origin: str = "given"
    metrics: tuple[str, ...] = ()
    max_new_tokens: int | None = None

    def __repr__(self) -> str:
        counts = f"train: {len(self.train)}, validation: {len(self.validation)}"
        return f"<Task {self.name!r} from {self.source!r} ({counts}, test: {len(self.test)})>"

    @property
    def digest(self) -> str:
        """A hash of all examples: the same for the same data, wherever they came from."""
        splits = []
        for part in (self.train, self.validation, self.test):
            splits.append([example.content for example in part])
        return hashlib.sha256(json.dumps(splits).encode()).hexdigest()

    def with_validation(self, seed: int = 0) -> Task:
        """The task with a validation split: its own, or a tenth of `train` (500 at most) set apart.

        `seed` alone decides which; `validation_origin` records it. Raises TaskError when there is
        no training example, or fewer than two to divide.
        """
        if self.validation and self.train:
            return self
        if len(self.train) < 2:
            raise TaskError(
                f"Task {self.name!r} has {len(self.train)} training examples; training needs at "
                f"least two, one of them for validation."
            )
        count = min(max(1, round(len(self.train) * VALIDATION_SHARE)), VALIDATION_MOST)
        chosen = set(random.Random(seed).sample(range(len(self.train)), count))
        train = list[Example]()
        validation = list[Example]()
        for index, example in enumerate(self.train):
            part = validation if index in chosen else train
            part.append(example)
        return replace(
            self,
            train=tuple(train),
            validation=tuple(validation),
            validation_origin=f"{count} of {len(self.train)} training examples, seed {seed}",
        )

    def evaluation_examples(self, limit: int | None = None, seed: int = 0) -> tuple[Example, ...]:
        """The examples to score on: test, else validation, else train.

        `limit` draws that many of them, the same ones for a given `seed`, in file order; None keeps
        all. Raises TaskError when there is none.
        """
        examples = self.test or self.validation or self.train
        if not examples:
            raise TaskError(f"Task {self.name!r} has no examples.")
        return draw(examples, limit, seed)


def draw(examples: tuple[T, ...], most: int | None, seed: int) -> tuple[T, ...]:
    """`most` of the examples, drawn by `seed`, in their own order."""
    if most is None or most >= len(examples):
        return examples
    chosen = sorted(random.Random(seed).sample(range(len(examples)), most))
    return tuple(examples[i] for i in chosen)


def mix(tasks: Sequence[Task], name: str, *, most: int | None = None, seed: int = 0) -> Task:
    """One task with the training examples of all `tasks`, at most `most` of each, and no test
    split.

    Validation examples are each task's own or set apart by `seed`, up to VALIDATION_MOST of each,
    so that the few that training draws are not all of the largest task. Raises TaskError when one
    can't be trained on.
    """
    train = list[Example]()
    validation = list[Example]()
    sizes = []
    for task in [task.with_validation(seed) for task in tasks]:  # all of them can be trained on
        part = draw(task.train, most, seed)
        train += part
        validation += draw(task.validation, VALIDATION_MOST, seed)
        sizes.append(f"{task.source} ({len(part)})")
    return Task(
        name,
        train=tuple(train),
        validation=tuple(validation),
        source=f"mixture of {', '.join(sizes)}",
        validation_origin=f"each task's own, or set apart from it by seed {seed}; at most "
        f"{VALIDATION_MOST} of each",
    )


@dataclass(frozen=True)
class Sources(Settings):
    """Where a suite's files are.

    `data` is a folder with copies of Hub datasets, each in the layout of its repository, at
    `data/OWNER/NAME` or `data/NAME`; None reads from the Hub (or its cache). `templates` is a
    folder of promptsource templates (`DATASET/CONFIG/templates.yaml`); None uses those of the
    installed package promptsource.
    """

    data: Annotated[Path | None, "Folder of copies of Hub datasets; default: the Hub."] = None
    templates: Annotated[Path | None, "Folder of promptsource templates, for P3 datasets."] = None


@dataclass(frozen=True)
class Entry:
    """One dataset of a suite.

    `read` loads it. `metrics` and `max_new_tokens` are those of the task that `read` returns.
    `train_examples` is their number if known without loading; None means unknown. `source` says in
    words where the data come from.
    """

    name: str
    read: Callable[[Sources], Task]
    metrics: tuple[str, ...] = ()
    max_new_tokens: int | None = None
    train_examples: int | None = None
    source: str = ""


def refuse_twice(
    what: str,
    names: Iterable[str],
    error: type[PhatgooseError] = TaskError,
    advice: str = "rename one",
) -> None:
    """Raise `error` if two of `what`, such as "tasks", have one name."""
    for name, count in Counter(names).items():
        if count > 1:
            raise error(f"Two {what} are called {name!r}; {advice}.")


@dataclass(frozen=True)
class Suite:
    name: str
    entries: tuple[Entry, ...]

    @classmethod
    def of(cls, name: str, tasks: Iterable[Task]) -> Suite:
        """The suite of these tasks, which are loaded already."""

        def entry(task: Task) -> Entry:
            return Entry(task.name, lambda _: task, task.metrics, task.max_new_tokens)

        return cls(name, tuple(map(entry, tasks)))

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(entry.name for entry in self.entries)

    def entry(self, name: str) -> Entry:
        for entry in self.entries:
            if entry.name == name:
                return entry
        raise TaskError(
            f"Suite {self.name} has no dataset {name!r}; it has {', '.join(self.names)}."
            f"{closest(name, self.names)}"
        )

    def load(self, sources: Sources | None = None) -> tuple[Task, ...]:
        return tuple(entry.read(sources or Sources()) for entry in self.entries)
