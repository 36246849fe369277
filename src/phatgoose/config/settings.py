"""How a setting works: a typed field with a help text and a limit, checked when it is set."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from numbers import Integral, Real
from types import NoneType
from typing import Any, TypeVar, get_args, get_type_hints

from ..errors import ConfigError

__all__ = [
    "AT_LEAST_1",
    "NOT_NEGATIVE",
    "POSITIVE",
    "RATIO",
    "SEED",
    "Limit",
    "Setting",
    "Settings",
]
__all__ += ["from_mapping", "given_or_default", "one_of", "require_one_of", "settings_of"]

Config = TypeVar("Config")

SEEDS = 1 << 32  # numpy accepts no larger ones, and Trainer seeds numpy too
TYPE_NAMES = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}


@dataclass(frozen=True)
class Limit:
    """What a setting must be, in words and as a test. A setting that is None passes."""

    words: str
    holds: Callable[[Any], bool]


AT_LEAST_1 = Limit("at least 1", lambda value: value >= 1)
POSITIVE = Limit("above 0", lambda value: value > 0)
NOT_NEGATIVE = Limit("0 or more", lambda value: value >= 0)
RATIO = Limit("from 0 to 1", lambda value: 0 <= value <= 1)
SEED = Limit(f"from 0 to {SEEDS - 1}", lambda value: 0 <= value < SEEDS)


def one_of(known: Sequence[str]) -> Limit:
    """The limit of a setting that must be one of the `known` names."""
    return Limit(f"one of {', '.join(known)}", lambda value: value in known)


class Settings:
    """Base of all settings: checks each value against the type of its field.

    Subclasses are frozen dataclasses whose fields are `Annotated[type, help text]`, with a `Limit`
    as a third part where not every value will do. Numbers of other libraries (numpy's) become
    Python's, and integers given for a float become floats.
    """

    def __post_init__(self) -> None:
        """Raise ConfigError for a value of the wrong type, not finite, or beyond its limit."""
        for setting in settings_of(type(self)):
            value = _typed(setting, getattr(self, setting.name))
            if setting.limit is not None and value is not None:
                _require(setting.limit.holds(value), setting.name, value, setting.limit.words)
            object.__setattr__(self, setting.name, value)


@dataclass(frozen=True)
class Setting:
    """One field of a config class, for the command line and the recipes."""

    name: str
    type: Any
    help: str
    default: Any
    limit: Limit | None = None


def settings_of(config: type) -> tuple[Setting, ...]:
    """The settings of a config class, in field order."""
    return _read_off(config)


@cache
def _read_off(config: type) -> tuple[Setting, ...]:
    hints = get_type_hints(config, include_extras=True)
    settings = []
    for item in dataclasses.fields(config):
        annotated, help_text, *limit = get_args(hints[item.name])
        settings.append(Setting(item.name, annotated, help_text, item.default, *limit))
    return tuple(settings)


def from_mapping(config: type[Config], values: Mapping[str, Any], where: str) -> Config:
    """A `config` filled from `values`; missing fields keep their default.

    Raises ConfigError, naming `where`, for an unknown key or a value that `config` refuses.
    """
    known = [setting.name for setting in settings_of(config)]
    for key in values:
        if key not in known:
            raise ConfigError(f"{where}: unknown setting {key!r}; known are {', '.join(known)}.")
    try:
        return config(**values)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def given_or_default(kind: type[Config], given: Config | None, name: str) -> Config:
    """The settings `given`, or the default ones. Raises ConfigError where they are no `kind`."""
    if given is None:
        return kind()
    if not isinstance(given, kind):
        raise ConfigError(
            f"{name} is {given!r:.60}, but must be settings of class phatgoose.config."
            f"{kind.__name__}."
        )
    return given


def _require(holds: bool, name: str, got: object, wanted: str) -> None:
    if not holds:
        raise ConfigError(f"{name} is {got!r}, but must be {wanted}.")


def require_one_of(known: Sequence[str | None], name: str, got: object) -> None:
    """Raise ConfigError unless `got`, the value of `name`, is one of `known`."""
    if got not in known:
        names = ", ".join(name for name in known if name is not None)
        raise ConfigError(f"{name} is {got!r}, but must be one of {names}.")


def _typed(setting: Setting, value: Any) -> Any:
    """`value` as one of the types of `setting`. Raises ConfigError where none fits."""
    kinds = get_args(setting.type) or (setting.type,)
    if isinstance(value, bool | NoneType) and type(value) in kinds:
        return value
    if not isinstance(value, bool):
        if int in kinds and isinstance(value, Integral):
            return int(value)
        if float in kinds and isinstance(value, Real):
            return _finite(setting.name, value)
        if str in kinds and isinstance(value, str):
            return value
    wanted = " or ".join(TYPE_NAMES[kind] for kind in kinds if kind in TYPE_NAMES)
    raise ConfigError(f"{setting.name} is {value!r}, but must be {wanted}.")


def _finite(name: str, value: Real) -> float:
    """`value` as a float. Raises ConfigError for infinity, NaN and too large integers."""
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    _require(math.isfinite(number), name, number, "a finite number")
    return number
