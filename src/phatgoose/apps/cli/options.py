"""Options of commands: recipes, flags made of dataclasses, and what commands share."""

from __future__ import annotations

import functools
import inspect
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_type_hints

import typer

from ...config import (
    POOL_SETTINGS,
    TASK_FILES,
    Formatting,
    GateTraining,
    Peft,
    Routing,
    Serving,
    Setting,
    Settings,
    Training,
    closest,
    from_mapping,
    settings_of,
)
from ...errors import ConfigError
from ...experts import kinds
from ...files import read_table, shortened
from ...routing.routers.registry import AUTO, class_of, known_names
from ..console import set_voice

if TYPE_CHECKING:
    from ...base import Base, BaseReference
    from ...experts.pool import Pool
    from ...jobs import Engine
    from ...routing.compose import OpenedModel
    from ...tasks.task import Sources, Task


@dataclass(frozen=True)
class Recipe:
    """A TOML recipe: one table per config class, and the tasks to run it on."""

    base: str | None = None
    dtype: str | None = None
    tasks: tuple[str, ...] = ()
    peft: str | None = None
    tables: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    data: Path | None = None
    templates: Path | None = None
    multitask: str | None = None
    mixture_most: int | None = None


SHAPES = {name: kind.settings for name, kind in kinds().items() if kind.settings is not None}
KINDS = ", ".join(SHAPES)
RECIPE_TABLES = {
    **SHAPES,
    "training": Training,
    "gates": GateTraining,
    "formatting": Formatting,
    "routing": Routing,
    "serving": Serving,
}
FOLDERS = ("data", "templates")
MODELS = ("embedder",)  # settings that are a folder or a Hub id
EMBEDDED = "smollm2"  # a base that is no folder; base.loading loads torch
ABOVE_TABLES: dict[str, type] = {  # what else a recipe may hold
    "tasks": list,
    "mixture_most": int,
    **dict.fromkeys(("base", "dtype", "peft", "data", "templates", "multitask"), str),
}
WORDS = {str: "a text", int: "a whole number", dict: "a table", list: "a list of texts"}


def read_recipe(path: str | Path) -> Recipe:
    """The recipe in the file `path`, TOML or YAML by its ending; paths in it are relative to it.

    A task that begins with the name of a known suite is no path ("./NAME" is the folder). A base or
    an embedder is a path where there is such a folder. Raises ConfigError for unknown keys.
    """
    path = Path(path)
    content = read_table(path, "Recipe", ConfigError)
    known = {*ABOVE_TABLES, *RECIPE_TABLES}
    for key, value in content.items():
        if key not in known:
            raise ConfigError(
                f"{path}: unknown key {shortened(key)}; known are {', '.join(sorted(known))}."
                f"{closest(key, known)}"
            )
        wanted = ABOVE_TABLES.get(key, dict)
        is_list_of_names = wanted is not list or all(isinstance(each, str) for each in value)
        if type(value) is not wanted or not is_list_of_names:
            raise ConfigError(f"{path}: {key} is {shortened(value)}, but must be {WORDS[wanted]}.")
    if (peft := content.get("peft")) not in (None, *SHAPES):
        raise ConfigError(f"{path}: peft is {peft!r:.80}, but must be one of {', '.join(SHAPES)}.")
    above = {key: value for key, value in content.items() if key in ABOVE_TABLES}
    if "base" in above:
        above["base"] = _model(path.parent, above["base"])
    above |= {key: path.parent / above[key] for key in FOLDERS if key in above}
    tasks = tuple(_relative_to(path.parent, task) for task in above.pop("tasks", ()))
    tables = {key: _table(path, content[key], key) for key in RECIPE_TABLES if key in content}
    return Recipe(**above, tasks=tasks, tables=tables)


def written_recipe(options: Mapping[str, Any], settings: Iterable[Settings]) -> str:
    """A recipe in YAML of these settings, all of them, which --config reads in any folder.

    `options` are of `ABOVE_TABLES`; None is left out.
    """
    import yaml  # type: ignore[import-untyped]

    content: dict[str, Any] = {k: v for k, v in options.items() if v is not None}
    if content["dtype"] == "auto":
        del content["dtype"]
    for name in ("base", *FOLDERS):
        if _is_here(content, name) and content[name] != EMBEDDED:
            content[name] = os.path.abspath(content[name])
    for each in settings:
        table = {k: v for k, v in vars(each).items() if v is not None}
        here = {name: os.path.abspath(table[name]) for name in MODELS if _is_here(table, name)}
        content[TABLE_OF[type(each)]] = {**table, **here}
    return str(yaml.safe_dump(content, sort_keys=False, allow_unicode=True))


def _is_here(table: Mapping[str, Any], name: str) -> bool:
    return name in table and os.path.isdir(table[name])


def _table(path: Path, table: dict[str, Any], key: str) -> dict[str, Any]:
    from_mapping(RECIPE_TABLES[key], table, f"{path}, [{key}]")
    named = {name: _model(path.parent, table[name]) for name in MODELS if name in table}
    return {**table, **named}


def _model(folder: Path, name: str) -> str:
    found = folder / name
    elsewhere = found != Path(name) and name not in ("", EMBEDDED)
    return str(found) if elsewhere and os.path.isdir(found) else name


def _relative_to(folder: Path, task: str) -> str:
    from ...tasks.suites.registry import known_suites  # loads numpy, which reading settings needn't

    def in_suite(name: str) -> bool:
        return name.split("/")[0] in known_suites() and not name.endswith(TASK_FILES)

    path = str(folder / task)
    if in_suite(task) or task.startswith("hub:"):
        return task
    return os.path.join(os.curdir, path) if in_suite(path) else path


# Command-line flags from annotations: a command takes objects, typer shows one flag per field.
#
# `Annotated[type, "help"]` is the flag of a parameter, of a field of an option group (options.py)
# and of a setting (`config`), named after it; {"min": 1} may follow the help text. Settings are
# their defaults, overlaid by the recipe, overlaid by the command line.

TABLE_OF = {config: table for table, config in RECIPE_TABLES.items()}
RECIPE = Annotated[
    Path | None,
    typer.Option(
        "--config",
        "--recipe",
        help="TOML or YAML file with settings; flags given here win over it.",
    ),
]


@dataclass(frozen=True)
class ExpertShapes:
    by_kind: Mapping[str, Peft]
    flags: frozenset[str]

    def of(self, kind: str) -> Peft:
        if kind not in self.by_kind:
            raise ConfigError(
                f"--peft is {kind!r}, but must be one of {', '.join(self.by_kind)}."
                f"{closest(kind, self.by_kind)}"
            )
        for name in sorted(self.flags):
            owners = [k for k, config in SHAPES.items() if hasattr(config, name)]
            if owners and kind not in owners:
                flag = flag_of(name)
                raise ConfigError(f"{flag} is for --peft {owners[0]}; the experts are {kind}.")
        return self.by_kind[kind]


@dataclass(frozen=True)
class Without:
    names: tuple[str, ...]


def with_flags(command: Callable[..., None]) -> Callable[..., None]:
    """`command` as typer takes it: with one flag per field in place of each dataclass.

    Classes of settings are parameters named as in `RECIPE_TABLES`; `ExpertShapes` stands for those
    of all kinds of expert. A command with settings has --recipe, which also gives the options in
    `ABOVE_TABLES` their default. A setting that several classes share is one flag. A parameter
    `given` receives the names of the settings in recipe and command line.
    """
    parts = _Parameters(inspect.signature(command, eval_str=True))
    shown = list(parts.shown())
    # lm-eval's command has a context, and hands all options on.
    if "context" not in {each.name for each in shown}:
        shown += _voice()

    @functools.wraps(command)
    def run(**arguments: Any) -> None:
        set_voice(*(arguments.pop(name, False) for name in VOICE))
        command(**parts.filled(arguments))

    run.__signature__ = inspect.Signature(shown)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in shown}
    return run


VOICE = {  # what every command takes, and shows in the program's own help alone
    "quiet": "Print only results, warnings and errors.",
    "verbose": "Print more progress.",
}


def _voice() -> Iterator[inspect.Parameter]:
    for name, text in VOICE.items():
        option = typer.Option(flag_of(name), help=text, hidden=True)
        yield _option(name, Annotated[bool, option], False)


class _Parameters:
    """A command's parameters: its own options, groups of them, and settings by table."""

    def __init__(self, signature: inspect.Signature) -> None:
        self.own: list[inspect.Parameter] = []
        self.groups: dict[str, Any] = {}
        self.configs: dict[str, Any] = {}
        self.settings: dict[str, list[Setting]] = {}
        self.shapes: str | None = None
        self.takes_given = "given" in signature.parameters
        for name, parameter in signature.parameters.items():
            kind, *details = get_args(parameter.annotation) or (parameter.annotation,)
            hidden = details[0].names if details and isinstance(details[0], Without) else ()
            if kind is ExpertShapes:
                self.shapes = name
                self.configs |= SHAPES
            elif kind in TABLE_OF:
                self.configs[name] = kind
                self.settings[name] = [s for s in settings_of(kind) if s.name not in hidden]
            elif is_dataclass(kind):
                self.groups[name] = kind
                self.own += _fields_of(kind)
            elif name != "given":
                self.own.append(_option(name, parameter.annotation, parameter.default))
        for table, config in self.configs.items():
            self.settings.setdefault(table, list(settings_of(config)))

    def shown(self) -> Iterator[inspect.Parameter]:
        yield from self.own
        if self.configs:
            yield _option("recipe", RECIPE, None)
        tabled = [(s, table) for table in self.configs for s in self.settings[table]]
        tables = {
            s.name: [table for each, table in tabled if each.name == s.name] for s, _ in tabled
        }
        first = {s.name: s for s, _ in reversed(tabled)}  # whose help and type a shared flag has
        yield from (_setting_flag(first[name], ", ".join(tables[name])) for name in tables)

    def filled(self, arguments: dict[str, Any]) -> dict[str, Any]:
        path = arguments.pop("recipe", None)
        recipe = read_recipe(path) if path else Recipe()
        names = {setting.name for each in self.settings.values() for setting in each}
        flags = {name: arguments.pop(name) for name in names}
        flags = {name: value for name, value in flags.items() if value is not None}
        objects: dict[str, Any] = {}
        given: set[str] = set()
        for table, config in self.configs.items():
            typed = {s.name: flags[s.name] for s in self.settings[table] if s.name in flags}
            values = {**recipe.tables.get(table, {}), **typed}
            objects[table] = from_mapping(config, values, "command line")
            given |= values.keys()
        for name in ABOVE_TABLES.keys() & arguments.keys():
            if arguments[name] in (None, []):  # and not 0, which may be refused
                arguments[name] = getattr(recipe, name)
        for name, group in self.groups.items():
            objects[name] = group(**{f.name: arguments.pop(f.name) for f in fields(group)})
        if self.shapes:
            shapes = {kind: objects.pop(kind) for kind in SHAPES}
            objects[self.shapes] = ExpertShapes(shapes, frozenset(flags))
        if self.takes_given:
            objects["given"] = frozenset(given)
        return {**arguments, **objects}


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def _fields_of(group: Any) -> Iterator[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    return (_option(field.name, hints[field.name], field.default) for field in fields(group))


def _option(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    """A parameter, which is a flag if its annotation is a help text and a range of values."""
    kind, *details = get_args(annotation) or (annotation,)
    if details and isinstance(details[0], str):
        flag = flag_of(name)
        flags = f"{flag}/--no-{flag[2:]}" if kind is bool and default else flag
        limits: dict[str, Any] = details[1] if details[1:] else {}
        annotation = Annotated[kind, typer.Option(flags, help=details[0], **limits)]
    keyword = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, keyword, default=default, annotation=annotation)


def _setting_flag(setting: Setting, panel: str) -> inspect.Parameter:
    kind = next(option for option in get_args(setting.type) or (setting.type,) if option)
    shown = setting.help
    shown += f" One of {', '.join((AUTO, *known_names()))}." if setting.name == "router" else ""
    shown += "" if setting.default is None else f" (default: {setting.default})"
    flag = flag_of(setting.name)
    flags = f"{flag}/--no-{flag[2:]}" if kind is bool else flag
    option = typer.Option(flags, help=shown, rich_help_panel=f"Settings: {panel}")
    return _option(setting.name, Annotated[kind | None, option], None)


# Options that several commands share, in groups: each option is defined and described once.
#
# A command takes a group as one parameter (`with_flags`) and hands it on whole.

ANOTHER_OUT = "choose another --out"  # for `require_free`
PoolArgument = Annotated[list[Path], typer.Argument(help="Folders of experts, or hub:OWNER/NAME.")]
ModelArgument = Annotated[
    str,
    typer.Argument(
        help="A routed model's folder, a pool (folder or hub:OWNER/NAME), or a base model alone."
    ),
]
ExpertOut = Annotated[Path, "The expert directory to write."]
ExpertName = Annotated[str | None, "The expert's name; default: the name of --out."]
TaskOption = Annotated[str, "The data it was trained on."]
BaseOption = Annotated[str | None, "Base model: a Hub id, a local folder, or smollm2 (bundled)."]
JsonOption = Annotated[Path | None, "Write the results as JSON to this file; -: print them."]


def open_pool(places: list[Path]) -> Pool:
    from ...experts.pool import Pool

    return Pool.open(places[0] if len(places) == 1 else places)


def split(values: list[str] | None) -> list[str]:
    return [name for value in values or [] for name in value.split(",") if name]


@dataclass(frozen=True)
class BaseOptions:
    base: BaseOption = None
    dtype: Annotated[
        str,
        "auto (the default), bfloat16, float16, float32 or 4bit (weights of bitsandbytes, as for "
        "QLoRA).",
    ] = None  # type: ignore[assignment]  # "auto", unless a recipe has another

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", self.dtype or "auto")

    def load(self, default: BaseReference | None) -> Base:
        from ...base import SMOLLM2, load_base

        if self.base or default is None:
            return load_base(self.base or SMOLLM2, dtype=self.dtype)
        return load_base(default.id, dtype=self.dtype, revision=default.revision)

    def load_for(self, pool: Pool) -> Base:
        from ...routing.composition import resolve_base

        return resolve_base(self.base, pool.base, self.dtype)


def only_with(what: str, there: bool, given: Mapping[str, object]) -> None:
    for name, value in given.items():
        if value is not None and not there:
            raise ConfigError(f"{flag_of(name)} is for {what}, which was not given.")


def warn_of_unused_k(routing: Routing) -> None:
    if routing.router != AUTO:
        router = class_of(routing.router)
        if routing.k is not None and router.usual_k is None:
            warnings.warn(f"Router {router.name} doesn't use --k.", stacklevel=3)


def check_routing_flags(model: str, routing: Routing, given: frozenset[str]) -> None:
    """Raise ConfigError when `given` settings choose a routing for a `model` that is not a pool."""
    from ...routing.compose import require_pool

    if given & POOL_SETTINGS:
        require_pool(model)
    warn_of_unused_k(routing)


@dataclass(frozen=True)
class ModelOptions(BaseOptions):
    keep: Annotated[list[str] | None, "Use only this expert (repeatable)."] = None
    leave_out: Annotated[list[str] | None, "Exclude this expert (repeatable)."] = None
    scores: Annotated[
        Path | None, "comparison.json of a compare, for oracle and best-individual."
    ] = None

    def open(self, model: str, routing: Routing, given: frozenset[str]) -> OpenedModel:
        from ...routing.compose import open_model, selected

        check_routing_flags(model, routing, given)
        place = selected(model, self.keep, self.leave_out)
        return open_model(place, self.base, dtype=self.dtype, routing=routing, scores=self.scores)


@dataclass(frozen=True)
class TemplateOptions:
    template: Annotated[str | None, "jinja2 template 'input ||| target' over a row's fields."] = (
        None
    )
    choices: Annotated[str | None, "jinja2 template of the answer choices, 'yes ||| no'."] = None

    def load(self, source: str) -> Task:
        from ...tasks.loading import load_task

        return load_task(source, **vars(self))


@dataclass(frozen=True)
class SourceOptions:
    data: Annotated[Path | None, "Folder of copies of Hub datasets; default: the Hub itself."] = (
        None
    )
    templates: Annotated[Path | None, "Folder of promptsource templates, for P3 datasets."] = None

    @property
    def sources(self) -> Sources:
        from ...tasks.task import Sources

        return Sources(**vars(self))


@dataclass(frozen=True)
class ScoringOptions:
    limit: Annotated[int | None, "Maximum examples per task, drawn by --seed.", {"min": 1}] = None
    seed: Annotated[int, "Seed of the draw."] = 0
    max_new_tokens: Annotated[int, "Maximum new tokens if the task sets none.", {"min": 1}] = 64


@dataclass(frozen=True)
class RestartOptions:
    resume: Annotated[bool, "Continue unfinished work."] = False
    restart: Annotated[bool, "Discard unfinished work."] = False


@dataclass(frozen=True)
class EngineOptions:
    engine: Annotated[str, "local (this process) or ray (needs the extra 'ray')."] = "local"
    address: Annotated[
        str | None,
        "With --engine ray: a running cluster, HOST:PORT or auto; default: this machine.",
    ] = None
    gpus_per_worker: Annotated[
        float | None,
        "With --engine ray: 0.5 lets two workers share a GPU; default: 1 if there are GPUs.",
        {"min": 0},
    ] = None
    cpus_per_worker: Annotated[
        float | None,
        "With --engine ray: cores and threads of a worker (default: 1).",
        {"min": 0},
    ] = None

    workers: Annotated[
        int | None, "With --engine ray: number of workers; default: all that fit.", {"min": 1}
    ] = None

    def check(self) -> None:
        if self.engine not in ("local", "ray"):
            raise ConfigError(f"--engine is {self.engine!r}, but must be local or ray.")
        others = {name: value for name, value in vars(self).items() if name != "engine"}
        only_with("--engine ray", self.engine == "ray", others)

    @contextmanager
    def open(self) -> Iterator[Engine]:
        self.check()
        if self.engine == "ray":
            from ..ray_engine import RayEngine, connected

            with connected(self.address):
                yield RayEngine(self.workers, self.gpus_per_worker, self.cpus_per_worker)
            return
        from ...jobs import LocalEngine

        yield LocalEngine()
