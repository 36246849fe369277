"""Options of commands: recipes, flags made of dataclasses, and what commands share."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

import typer

from ...config import (
    AT_LEAST_1,
    Formatting,
    GateTraining,
    Peft,
    PromptFormatting,
    Routing,
    ScoringSettings,
    Serving,
    Setting,
    Settings,
    Training,
    from_mapping,
    settings_of,
)
from ...errors import ConfigError
from ...experts import kinds
from ...files import read_table, shortened
from ...names import HUB, SMOLLM2, require_base, require_pool_there
from ...routing.routers.registry import AUTO, OURS, check_known, known_names
from ...tasks.task import Sources
from ..console import check_report, set_voice

if TYPE_CHECKING:
    from ...base.identity import Base, BaseReference
    from ...experts.pool import Pool
    from ...jobs import Engine
    from ...tasks.task import Task

SHAPES = {name: kind.settings for name, kind in kinds().items() if kind.settings is not None}
RECIPE_TABLES: dict[str, type[Settings]] = {
    **SHAPES,
    "training": Training,
    "gates": GateTraining,
    "formatting": Formatting,
    "routing": Routing,
    "serving": Serving,
}
TABLE_OF = {config: table for table, config in RECIPE_TABLES.items()}
TABLE_OF[PromptFormatting] = "formatting"
PATHS = ("base", "data", "templates")
ABOVE_TABLES = {"tasks": list, **dict.fromkeys(("dtype", "peft", *PATHS), str)}


def read_recipe(path: Path) -> dict[str, Any]:
    """What the TOML file `path` holds: tables of settings, and above them `ABOVE_TABLES`.

    Names of tasks, base, data and templates are relative to it if there is such a file or folder.
    Raises ConfigError for unknown keys and values that settings refuse.
    """
    content: dict[str, Any] = read_table(path, "Recipe", ConfigError)
    types: dict[str, Any] = {**ABOVE_TABLES, **dict.fromkeys(RECIPE_TABLES, dict)}
    for key, value in content.items():
        if type(value) is not types.get(key):
            listed = ", ".join(f"{name} ({kind.__name__})" for name, kind in types.items())
            raise ConfigError(f"{path}: {key:.80} is {shortened(value)}; known are {listed}.")
        if key in RECIPE_TABLES:
            from_mapping(RECIPE_TABLES[key], value, f"{path}, [{key}]")

    def beside(name: object) -> str:
        place = path.parent / str(name)
        return str(place) if name != SMOLLM2 and place.exists() else str(name)

    for key in PATHS:
        if key in content:
            content[key] = beside(content[key])
    content["tasks"] = [beside(task) for task in content.get("tasks", ())]
    return content


# A command takes objects, and typer shows one flag for each of their fields. `Annotated[type,
# "help"]` is the flag of a parameter, of a group's field (below) and of a setting (`config`).
# Settings are their defaults, overlaid by the recipe, overlaid by the command line.
#
# tyro 1.0.17 and cyclopts 5.5.2 were each tried on train, compare and serve. Neither reads these
# help texts and limits, nor makes one set of flags for all kinds of expert, so flags still had to
# be made of settings and turned back. That is 1,220 tokens here, was 1,210 over cyclopts and 960
# over tyro: both without --quiet, the names of routers and `lm-eval`, cyclopts' without defaults,
# and tyro's without a line for most errors, which it prints in boxes. `train --help` took 0.61 s
# by typer and by cyclopts, 0.46 s by tyro. tyro's hook for errors is private and has no "did you
# mean"; it lets `serve` start without a model, and adds to a list's default (--methods) instead
# of replacing it.

RECIPE = Annotated[Path | None, typer.Option(help="TOML file with settings; flags win over it.")]
KIND: Any = Literal[tuple(SHAPES)]
PEFT = Setting("peft", KIND, f"Kind of expert: {', '.join(SHAPES)}.", "lora")
VOICE = {  # what every command takes, and shows in the program's own help alone
    "quiet": "Print only results, warnings and errors.",
    "verbose": "Print more progress.",
}


def is_group(annotation: object) -> bool:
    """True for a class of `Settings`, whose fields are flags."""
    kind = _parts(annotation)[0]
    return isinstance(kind, type) and issubclass(kind, Settings)


def _groups_in(config: type[Settings]) -> dict[str, type[Settings]]:
    """The fields of `config` that another class of settings makes, whose flags are beside its."""
    groups = {}
    for item in fields(config):
        factory: Any = item.default_factory
        if is_group(factory):
            groups[item.name] = factory
    return groups


def _settings_at(annotation: object) -> Iterator[tuple[str, Setting]]:
    """The settings of a parameter itself, each with the table of recipes that has it."""
    config, *hidden = _parts(annotation)
    configs = SHAPES if config is Peft else {TABLE_OF.get(config, ""): config}
    for table, settings in configs.items():
        for setting in settings_of(settings):
            if setting.name not in hidden:
                yield table, setting


def _flags_of(annotation: object) -> Iterator[tuple[str, Setting]]:
    """The same with those of the groups inside."""
    yield from _settings_at(annotation)
    for group in _groups_in(_parts(annotation)[0]).values():
        yield from _flags_of(group)


def _object_of(
    annotation: object, values: Mapping[str, object], recipe: Mapping[str, Any]
) -> Settings:
    """The settings by `values` of flags, else the recipe, else their defaults."""
    config: type[Settings] = _parts(annotation)[0]
    names = {setting.name for _, setting in _settings_at(annotation)}
    if config is Peft:
        config = SHAPES[PEFT.checked(values.get("peft", "lora"))]
    content = dict(recipe.get(TABLE_OF.get(config, ""), {}))
    content |= {name: values[name] for name in names & values.keys()}
    groups = _groups_in(config)
    content |= {name: _object_of(group, values, recipe) for name, group in groups.items()}
    return from_mapping(config, content, "command line", tuple(groups))


def with_flags(command: Callable[..., int | None]) -> Callable[..., int | None]:
    """`command` as typer takes it: with one flag per field in place of each `Settings`.

    `Annotated[Training, "steps"]` has no flag for the steps. A parameter `Peft` has the flags of
    all kinds of expert, and --peft to choose one. A setting that several classes share is one flag.
    A field may be made by another class of settings, whose flags stand beside those of its own.
    """
    parameters = inspect.signature(command, eval_str=True).parameters
    groups: dict[str, object] = {}
    settings: dict[str, Setting] = {}
    tables: dict[str, list[str]] = {}
    shown: list[inspect.Parameter] = []
    for name, parameter in parameters.items():
        if not is_group(parameter.annotation):
            shown.append(_parameter(name, parameter.annotation, parameter.default))
            continue
        groups[name] = parameter.annotation
        for table, setting in _flags_of(parameter.annotation):
            settings.setdefault(setting.name, setting)
            tables.setdefault(setting.name, []).append(table)
    in_recipes = set().union(*tables.values())
    if in_recipes & SHAPES.keys():
        shown.append(_setting_flag(PEFT, ""))
    if any(in_recipes):
        shown.append(_parameter("recipe", RECIPE, None))
    for name, setting in settings.items():
        shown.append(_setting_flag(setting, ", ".join(tables[name])))
    for name, text in VOICE.items():
        option = typer.Option(flag_of(name), help=text, hidden=True)
        shown.append(_parameter(name, Annotated[bool, option], False))

    @functools.wraps(command)
    def run(**arguments: Any) -> int | None:
        set_voice(*(arguments.pop(name) for name in VOICE))
        check_report(arguments.get("json"))
        path = arguments.pop("recipe", None)
        recipe = read_recipe(path) if path else {}
        flags = {name: value for name, value in arguments.items() if value not in (None, [])}
        values = recipe | flags
        filled = arguments | values
        for name, annotation in groups.items():
            filled[name] = _object_of(annotation, values, recipe)
        return command(**{name: filled[name] for name in parameters})

    run.__signature__ = inspect.Signature(shown)  # type: ignore[attr-defined]
    return run


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def _parts(annotation: object) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) is Annotated else (annotation,)


def _parameter(name: str, annotation: Any, default: object) -> inspect.Parameter:
    """A parameter, which is a flag if its annotation is a help text."""
    kind, *details = _parts(annotation)
    if details and isinstance(details[0], str):
        annotation = Annotated[kind, typer.Option(flag_of(name), help=details[0])]
    keyword = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, keyword, default=default, annotation=annotation)


def _setting_flag(setting: Setting, tables: str) -> inspect.Parameter:
    kind = setting.type
    if get_origin(kind) in (Union, UnionType):
        kinds = [part for part in get_args(kind) if part is not NoneType]
        kind = kinds[0] if len(kinds) == 1 else str
    text = setting.help
    if setting.name == "router":
        text += f" One of {', '.join((AUTO, *known_names()))}."
    if setting.default is not None:
        text += f" (default: {setting.default})"
    flag = flag_of(setting.name)
    if kind is bool:
        flag += f"/--no-{flag[2:]}"
    panel = f"Settings: {tables}" if tables else None
    option = typer.Option(flag, help=text, rich_help_panel=panel)
    return _parameter(setting.name, Annotated[kind | None, option], None)


# Options that several commands share, in groups: each option is defined and described once.
#
# A command takes a group as one parameter (`with_flags`) and hands it on whole.

ANOTHER_OUT = "choose another --out"  # for `require_free`
PoolArgument = Annotated[list[Path], typer.Argument(help="Folders of experts, or hub:OWNER/NAME.")]
ModelArgument = Annotated[
    str, typer.Argument(help="A routed model's folder, a pool (folder, hub:OWNER/NAME) or a base.")
]
Resume = Annotated[bool, "Continue unfinished work."]
ExpertOut = Annotated[Path, "The expert directory to write."]
BaseOption = Annotated[str | None, "Base model: a Hub id, a local folder, or smollm2 (bundled)."]
ReaderOption = Annotated[
    str | None, "Reader of the experts' prompts; default: the recorded, if it is a known one."
]
JsonOption = Annotated[Path | None, "Write the results as JSON to this file; -: print them."]


def open_pool(places: list[Path]) -> Pool:
    for place in places:
        require_pool_there(place)
    from ...experts.pool import Pool

    return Pool.open(places[0] if len(places) == 1 else places)


@dataclass(frozen=True)
class BaseOptions(Settings):
    base: BaseOption = None
    dtype: Annotated[str, "auto, bfloat16, float16, float32 or 4bit (as for QLoRA)."] = "auto"

    def load(self, default: BaseReference | None) -> Base:
        from ...base.loading import load_base

        if self.base or default is None:
            return load_base(self.base or SMOLLM2, dtype=self.dtype)
        return load_base(default.id, dtype=self.dtype, revision=default.revision)


def only_with(what: str, there: bool, values: Mapping[str, object]) -> None:
    for name, value in values.items():
        if value is not None and not there:
            raise ConfigError(f"{flag_of(name)} works only {what}.")


def changed(settings: Settings, *names: str) -> dict[str, object]:
    """The fields of these names whose values aren't the defaults."""
    defaults = type(settings)()
    return {n: getattr(settings, n) for n in names if getattr(settings, n) != getattr(defaults, n)}


def require_there(*names: str | None) -> None:
    """Raise BaseModelError for a model or base among `names` that is neither here nor on the Hub.

    Commands ask before they load torch, which takes seconds.
    """
    for name in filter(None, names):
        if not name.startswith(HUB):
            require_base(name)


def warn_of_unused_k(routing: Routing) -> None:
    name = routing.name
    if routing.k is None or name == AUTO:
        return
    if name in OURS:
        usual_k = OURS[name].k
    else:
        from ...routing.routers.router import class_of

        usual_k = class_of(name).usual_k
    if usual_k is None:
        warnings.warn(f"Router {name} doesn't use --k.", stacklevel=3)


@dataclass(frozen=True)
class ModelOptions(BaseOptions):
    keep: Annotated[list[str] | None, "Use only this expert (repeatable)."] = None
    leave_out: Annotated[list[str] | None, "Exclude this expert (repeatable)."] = None
    scores: Annotated[Path | None, "comparison.json, for oracle and best-individual."] = None
    routing: Routing = field(default_factory=Routing)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_known(self.routing.router)

    def open(self, model: str, *, keeps_factors: bool = False) -> Base:
        """What is at `model`; ConfigError for a routing of one that has its own."""
        require_there(model, self.base)
        from ...routing.opening import open_model, require_pool

        routing = self.routing
        if self.keep or self.leave_out or routing != routing.of_any_model:
            require_pool(model)
        warn_of_unused_k(routing)
        if keeps_factors:  # with a kernel named, every expert's stay
            routing = replace(routing, kernel="concat")
        place = self.open_pool([Path(model)]) if self.keep or self.leave_out else model
        return open_model(place, self.base, dtype=self.dtype, routing=routing, scores=self.scores)

    def open_pool(self, places: list[Path]) -> Pool:
        return open_pool(places).select(self.keep, self.leave_out)


@dataclass(frozen=True)
class TemplateOptions(Settings):
    template: Annotated[str | None, "jinja2 template of a row, 'input ||| target'."] = None
    choices: Annotated[str | None, "jinja2 template of the answer choices, 'yes ||| no'."] = None

    def load(self, source: str) -> Task:
        from ...tasks.loading import load_task

        return load_task(source, **vars(self))


@dataclass(frozen=True)
class SuiteOptions(Settings):
    sources: Sources = field(default_factory=Sources)
    scoring: ScoringSettings = field(default_factory=ScoringSettings)


@dataclass(frozen=True)
class EngineOptions(Settings):
    ray: Annotated[
        str | None, "Work on Ray: on a cluster, HOST:PORT or auto, or on this machine (local)."
    ] = None
    workers: Annotated[int | None, "With --ray: how many (default: all that fit).", AT_LEAST_1] = (
        None
    )

    @contextmanager
    def open(self) -> Iterator[Engine]:
        only_with("with --ray", self.ray is not None, {"workers": self.workers})
        if self.ray is None:
            from ...jobs import Engine

            yield Engine()
            return
        from ..ray_engine import RayEngine, connected

        with connected(None if self.ray == "local" else self.ray):
            yield RayEngine(self.workers)
