"""Command-line flags derived from the config dataclasses: defined once, described once.

A command function takes its settings as keyword-only parameters annotated with config classes. The
decorator `with_settings` shows typer one flag per field instead, and hands the function filled
config objects: defaults, overlaid by the recipe, overlaid by what stands on the command line.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Optional, get_args

import typer

from ...config import PEFT_KINDS, Peft, Setting, from_mapping, settings_of
from ...errors import ConfigError
from .recipe import RECIPE_TABLES, Recipe, read_recipe

__all__ = ["RecipeOption", "shape_of", "with_settings"]

TABLE_OF = {config: table for table, config in RECIPE_TABLES.items()}

RecipeOption = Annotated[
    Optional[Path],  # noqa: UP045  typer reads annotations at run time, on Python 3.10 too
    typer.Option("--recipe", help="TOML file with settings; flags given here win over it."),
]


def with_settings(
    *configs: type, without: tuple[str, ...] = ()
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A decorator that shows each config parameter of a command as one flag per field.

    The decorated function must take `recipe` (a `Recipe`) and one keyword parameter per config,
    named as in `RECIPE_TABLES`. If it takes `given` too, it gets the names of the settings that
    the recipe or the command line gave; `flagged` are those of the command line alone. A field
    that several configs share is one flag, which goes to all of them. Fields named in `without`
    get no flag.
    """
    shown = {
        config: [setting for setting in settings_of(config) if setting.name not in without]
        for config in configs
    }

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        fields = {config: {setting.name for setting in shown[config]} for config in configs}
        tables = {TABLE_OF[config] for config in configs}
        signature = inspect.signature(command, eval_str=True)

        @functools.wraps(command)
        def run(**arguments: Any) -> None:
            path = arguments.pop("recipe", None)
            recipe = read_recipe(path) if path else Recipe()
            values_of = {name: arguments.pop(name) for name in set().union(*fields.values())}
            flags = {name: value for name, value in values_of.items() if value is not None}
            given: set[str] = set()
            for config in configs:
                table = TABLE_OF[config]
                own = {name: value for name, value in flags.items() if name in fields[config]}
                values = {**recipe.tables.get(table, {}), **own}
                arguments[table] = from_mapping(config, values, "command line")
                given |= values.keys()
            if "given" in signature.parameters:
                arguments["given"] = frozenset(given)
            if "flagged" in signature.parameters:
                arguments["flagged"] = frozenset(flags)
            command(recipe=recipe, **arguments)

        ours = {*tables, "recipe", "given", "flagged"}
        own = [p for p in signature.parameters.values() if p.name not in ours]
        recipe_parameter = inspect.Parameter(
            "recipe", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=RecipeOption
        )
        listed = [(setting, TABLE_OF[config]) for config in configs for setting in shown[config]]
        flags = list({setting.name: _flag(setting, table) for setting, table in listed}.values())
        run.__signature__ = signature.replace(  # type: ignore[attr-defined]
            parameters=[*own, recipe_parameter, *flags]
        )
        run.__annotations__ = {p.name: p.annotation for p in [*own, recipe_parameter, *flags]}
        return run

    return decorate


def shape_of(kind: str, shapes: dict[str, Peft], flagged: frozenset[str]) -> Peft:
    """The shape of an expert of this kind. Raises ConfigError for flags that are another kind's."""
    if kind not in shapes:
        raise ConfigError(f"--peft is {kind!r}, but must be one of {', '.join(shapes)}.")
    owners = {
        setting.name: [k for k, config in PEFT_KINDS.items() if hasattr(config, setting.name)]
        for config in PEFT_KINDS.values()
        for setting in settings_of(config)
    }
    for name in sorted(flagged & owners.keys()):
        if kind not in owners[name]:
            flag = "--" + name.replace("_", "-")
            raise ConfigError(f"{flag} is for --peft {owners[name][0]}; the experts are {kind}.")
    return shapes[kind]


def _flag(setting: Setting, panel: str) -> inspect.Parameter:
    """One optional flag; None means that it was not given."""
    kind = next(option for option in get_args(setting.type) or (setting.type,) if option)
    shown = "" if setting.default is None else f" (default: {setting.default})"
    flag = "--" + setting.name.replace("_", "-")
    names = f"{flag}/--no-{flag[2:]}" if kind is bool else flag
    return inspect.Parameter(
        setting.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[
            Optional[kind],  # noqa: UP045
            typer.Option(names, help=setting.help + shown, rich_help_panel=f"Settings: {panel}"),
        ],
    )
