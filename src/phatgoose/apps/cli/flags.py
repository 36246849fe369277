"""Command-line flags from annotations: a command takes objects, typer shows one flag per field.

`Annotated[type, "help"]` is the flag of a parameter, of a field of an option group (options.py) and
of a setting (`config`), named after it; {"min": 1} may follow the help text. Settings are their
defaults, overlaid by the recipe, overlaid by the command line.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import typer

from ...config import PEFT_KINDS, Peft, Setting, from_mapping, settings_of
from ...errors import ConfigError
from ...routing.routers.registry import AUTO, ROUTERS
from .recipe import RECIPE_OPTIONS, RECIPE_TABLES, Recipe, read_recipe

__all__ = ["ExpertShapes", "Without", "flag_of", "with_flags"]

TABLE_OF = {config: table for table, config in RECIPE_TABLES.items()}
RECIPE = Annotated[Path | None, "TOML file with settings; flags given here win over it."]


# Settings that a flag leaves without a use: joint gates have the expert's rate, and raw inputs.
IDLE = {"joint": ("gate_learning_rate", "gate_inputs")}


@dataclass(frozen=True)
class ExpertShapes:
    """The shape that an expert of each kind would have, and the flags that were given."""

    by_kind: Mapping[str, Peft]
    flags: frozenset[str]

    def of(self, kind: str) -> Peft:
        """The shape of this kind. Raises ConfigError for flags that are another kind's."""
        if kind not in self.by_kind:
            raise ConfigError(f"--peft is {kind!r}, but must be one of {', '.join(self.by_kind)}.")
        for name in sorted(self.flags):
            owners = [k for k, config in PEFT_KINDS.items() if hasattr(config, name)]
            if owners and kind not in owners:
                flag = flag_of(name)
                raise ConfigError(f"{flag} is for --peft {owners[0]}; the experts are {kind}.")
        return self.by_kind[kind]


@dataclass(frozen=True)
class Without:
    """Annotates a class of settings some of whose settings get no flag."""

    names: tuple[str, ...]


def with_flags(command: Callable[..., None]) -> Callable[..., None]:
    """`command` as typer takes it: with one flag per field in place of each dataclass.

    Classes of settings are parameters named as in `RECIPE_TABLES`; `ExpertShapes` stands for those
    of all kinds of expert. A command with settings has --recipe, which also gives the options in
    `RECIPE_OPTIONS` their default. A setting that several classes share is one flag and goes to all
    of them. A parameter `given` receives the names of the settings in recipe and command line.
    """
    parts = _Parameters(inspect.signature(command, eval_str=True))

    @functools.wraps(command)
    def run(**arguments: Any) -> None:
        command(**parts.filled(arguments))

    shown = list(parts.shown())
    run.__signature__ = inspect.Signature(shown)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in shown}
    return run


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
                self.configs |= PEFT_KINDS
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
        """What typer is shown."""
        yield from self.own
        if self.configs:
            yield _option("recipe", RECIPE, None)
        tabled = [(s, table) for table in self.configs for s in self.settings[table]]
        tables = {
            s.name: [table for each, table in tabled if each.name == s.name] for s, _ in tabled
        }
        yield from {s.name: _setting_flag(s, ", ".join(tables[s.name])) for s, _ in tabled}.values()

    def filled(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """What the command is called with, from the `arguments` that typer parsed.

        A flag that leaves another setting without a use (IDLE) takes no notice of the recipe's.
        """
        path = arguments.pop("recipe", None)
        recipe = read_recipe(path) if path else Recipe()
        names = {setting.name for each in self.settings.values() for setting in each}
        flags = {name: arguments.pop(name) for name in names}
        flags = {name: value for name, value in flags.items() if value is not None}
        objects: dict[str, Any] = {}
        given: set[str] = set()
        for table, config in self.configs.items():
            typed = {s.name: flags[s.name] for s in self.settings[table] if s.name in flags}
            idle = {each for name, value in typed.items() if value for each in IDLE.get(name, ())}
            written = recipe.tables.get(table, {})
            values = {name: written[name] for name in written if name not in idle} | typed
            objects[table] = from_mapping(config, values, "command line")
            given |= values.keys()
        for name in RECIPE_OPTIONS & arguments.keys():
            arguments[name] = arguments[name] or getattr(recipe, name)
        for name, group in self.groups.items():
            objects[name] = group(**{f.name: arguments.pop(f.name) for f in fields(group)})
        if self.shapes:
            shapes = {kind: objects.pop(kind) for kind in PEFT_KINDS}
            objects[self.shapes] = ExpertShapes(shapes, frozenset(flags))
        if self.takes_given:
            objects["given"] = frozenset(given)
        return {**arguments, **objects}


def flag_of(name: str) -> str:
    """The flag of the setting or option with this name."""
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
    """The flag of a setting; None means that it was not given."""
    kind = next(option for option in get_args(setting.type) or (setting.type,) if option)
    shown = setting.help
    shown += f" One of {', '.join((AUTO, *ROUTERS))}." if setting.name == "router" else ""
    shown += "" if setting.default is None else f" (default: {setting.default})"
    flag = flag_of(setting.name)
    flags = f"{flag}/--no-{flag[2:]}" if kind is bool else flag
    option = typer.Option(flags, help=shown, rich_help_panel=f"Settings: {panel}")
    return _option(setting.name, Annotated[kind | None, option], None)
