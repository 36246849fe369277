"""Options that several commands share, in groups: each option is defined and described once.

A command takes a group as one parameter (`flags.with_flags`) and hands it on whole.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ...config import POOL_SETTINGS, Routing
from ...errors import ConfigError
from .flags import flag_of

if TYPE_CHECKING:
    from ...base.fingerprint import BaseReference
    from ...base.loading import Base
    from ...experts.pool import Pool
    from ...jobs import Engine
    from ...routing.open_model import OpenedModel
    from ...tasks.suites.entries import Sources
    from ...tasks.task import Task

__all__ = [
    "ANOTHER_OUT",
    "BaseOption",
    "BaseOptions",
    "EngineOptions",
    "ExpertName",
    "ExpertOut",
    "ModelArgument",
    "ModelOptions",
    "PoolArgument",
    "RayOptions",
    "ReplicaOptions",
    "RequireSigner",
    "RestartOptions",
    "ScoringOptions",
    "SourceOptions",
    "StoredOption",
    "TaskOption",
    "TemplateOptions",
    "check_routing_flags",
    "only_with",
    "open_pool",
    "split",
    "warn_of_unused",
]

ANOTHER_OUT = "choose another --out"  # for `require_free`
PoolArgument = Annotated[
    list[Path], typer.Argument(help="Folders of experts, hub:OWNER/NAME, or a manifest.")
]
ModelArgument = Annotated[
    str,
    typer.Argument(
        help="A routed model's folder, a pool (folder, hub:OWNER/NAME or manifest), or a base "
        "model alone."
    ),
]
ExpertOut = Annotated[Path, "The expert directory to write."]
RequireSigner = Annotated[
    list[Path] | None,
    "Use nothing of an expert unless the owner of this public key (PEM) signed every file of it; "
    "repeatable, any of them will do (needs the extra 'sign').",
]
ExpertName = Annotated[str | None, "The expert's name; default: the name of --out."]
TaskOption = Annotated[str, "The data it was trained on."]
BaseOption = Annotated[str | None, "Base model: a Hub id, a local folder, or smollm2 (embedded)."]
StoredOption = Annotated[
    str | None,
    "Type of the experts' factors in the file: float32, bfloat16, float16 or int8; "
    "default: the type that they are computed in.",
]


def open_pool(places: list[Path]) -> Pool:
    """The pool in these places (`PoolArgument`)."""
    from ...experts.pool import Pool

    return Pool.open(places[0] if len(places) == 1 else places)


def split(values: list[str] | None) -> list[str]:
    """The names in the values of an option that may be repeated or hold commas."""
    return [name for value in values or [] for name in value.split(",") if name]


@dataclass(frozen=True)
class BaseOptions:
    """Which base model, computed in which type."""

    base: BaseOption = None
    dtype: Annotated[str, "auto, bfloat16, float16 or float32."] = "auto"

    def load(self, default: BaseReference | None) -> Base:
        """The base, by `default` this one, and where that is None the embedded one."""
        from ...base.loading import load_base
        from ...base.smollm2 import SMOLLM2

        if self.base or default is None:
            return load_base(self.base or SMOLLM2, dtype=self.dtype)
        return load_base(default.id, dtype=self.dtype, revision=default.revision)

    def load_for(self, pool: Pool) -> Base:
        """The base, by default the one that `pool` names."""
        from ...routing.open_model import loaded_base

        return loaded_base(pool, self.base, self.dtype)


def only_with(what: str, there: bool, given: Mapping[str, object]) -> None:
    """Raise ConfigError where an option of `given`, by name, has a value without `what`."""
    for name, value in given.items():
        if value is not None and not there:
            raise ConfigError(f"{flag_of(name)} is for {what}, which was not given.")


def warn_of_unused(routing: Routing, given: frozenset[str] | None = None) -> None:
    """Warn of `given` settings, by name, that the router of `routing` doesn't look at.

    None stands for those that aren't the usual ones.
    """
    from ...routing.routers.registry import AUTO, spec_of

    if routing.router == AUTO:
        return
    given = routing.changed if given is None else given
    unused = sorted(map(flag_of, spec_of(routing.router).unused(given)))
    if unused:
        warnings.warn(f"Router {routing.router} doesn't use {', '.join(unused)}.", stacklevel=3)


def check_routing_flags(model: str, routing: Routing, given: frozenset[str]) -> None:
    """Raise ConfigError when `given` settings choose a routing for a `model` that is not a pool.

    Warns as `warn_of_unused` does.
    """
    from ...routing.open_model import require_pool

    if given & POOL_SETTINGS:
        require_pool(model)
    warn_of_unused(routing, given)


@dataclass(frozen=True)
class ModelOptions(BaseOptions):
    """How a model is opened: its base, and which experts of a pool take part."""

    keep: Annotated[list[str] | None, "Use this expert only (repeatable)."] = None
    leave_out: Annotated[list[str] | None, "Do without this expert (repeatable)."] = None
    scores: Annotated[
        Path | None, "comparison.json of a compare: for oracle and best-individual."
    ] = None

    def open(self, model: str, routing: Routing, given: frozenset[str]) -> OpenedModel:
        """The routed model, the pool routed by `routing`, or the base at `model`.

        Raises ConfigError when `given`, the names of the settings that the user gave, has some of
        a routing and `model` is not a pool.
        """
        from ...routing.open_model import open_model

        check_routing_flags(model, routing, given)
        return open_model(model, routing=routing, **vars(self))


@dataclass(frozen=True)
class TemplateOptions:
    """How the rows of a task become examples."""

    template: Annotated[str | None, "jinja2 template 'input ||| target' over a row's fields."] = (
        None
    )
    choices: Annotated[str | None, "jinja2 template of the answer choices, 'yes ||| no'."] = None

    def load(self, source: str) -> Task:
        """The task in a file, or hub:DATASET."""
        from ...tasks.loading import load_task

        return load_task(source, **vars(self))


@dataclass(frozen=True)
class SourceOptions:
    """Where the files of suites are."""

    data: Annotated[Path | None, "Folder of copies of Hub datasets; default: the Hub itself."] = (
        None
    )
    templates: Annotated[Path | None, "Folder of promptsource templates, for P3 datasets."] = None

    @property
    def sources(self) -> Sources:
        """The same for `tasks.suites`."""
        from ...tasks.suites.entries import Sources

        return Sources(**vars(self))


@dataclass(frozen=True)
class ScoringOptions:
    """Which examples are scored, and how long answers may be; named as `evaluate` names them."""

    limit: Annotated[int | None, "Use so many examples of a task, drawn by --seed.", {"min": 1}] = (
        None
    )
    seed: Annotated[int, "Seed of the draw."] = 0
    max_new_tokens: Annotated[
        int, "Tokens of a generated answer at most, where a task says nothing.", {"min": 1}
    ] = 64


@dataclass(frozen=True)
class RestartOptions:
    """What becomes of unfinished training."""

    resume: Annotated[bool, "Continue unfinished work."] = False
    restart: Annotated[bool, "Throw unfinished work away."] = False

    def __post_init__(self) -> None:
        """Raise ConfigError where both are asked for."""
        if self.resume and self.restart:
            raise ConfigError("--resume continues what --restart throws away; give one of them.")


@dataclass(frozen=True)
class RayOptions:
    """Where work is done."""

    engine: Annotated[str, "local (this process) or ray (needs the extra 'ray')."] = "local"
    address: Annotated[
        str | None,
        "With --engine ray: a running cluster, HOST:PORT or auto; default: this machine.",
    ] = None
    gpus_per_worker: Annotated[
        float | None,
        "With --engine ray: 0.5 lets two workers share a GPU; default: 1 where there are any.",
        {"min": 0},
    ] = None
    cpus_per_worker: Annotated[
        float | None,
        "With --engine ray: cores, and so threads, of a worker (default: 1).",
        {"min": 0},
    ] = None

    def check(self) -> None:
        """Raise ConfigError for an unknown engine, or an option of Ray's without Ray."""
        if self.engine not in ("local", "ray"):
            raise ConfigError(f"--engine is {self.engine!r}, but must be local or ray.")
        others = {name: value for name, value in vars(self).items() if name != "engine"}
        only_with("--engine ray", self.engine == "ray", others)


@dataclass(frozen=True)
class EngineOptions(RayOptions):
    """Where jobs are done."""

    workers: Annotated[
        int | None, "With --engine ray: so many workers; default: all that fit.", {"min": 1}
    ] = None

    @contextmanager
    def open(self) -> Iterator[Engine]:
        """The engine, connected while the context is open.

        Raises what `check` does, and EngineError when the engine can't be reached.
        """
        self.check()
        if self.engine == "ray":
            from ..ray import RayEngine, connected

            with connected(self.address):
                yield RayEngine(self.workers, self.gpus_per_worker, self.cpus_per_worker)
            return
        from ...jobs import LocalEngine

        yield LocalEngine()


@dataclass(frozen=True)
class ReplicaOptions(RayOptions):
    """Where copies of a server run."""

    replicas: Annotated[
        int | None, "With --engine ray: so many copies of the server (default: 1).", {"min": 1}
    ] = None
