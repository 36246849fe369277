"""Regular expressions that strangers wrote, matched in time linear in what they are matched with.

PEFT matches patterns of an adapter's config against the names of a model's layers, by Python's
matcher, which backtracks: a few repetitions one after the other, or a choice inside one, can take
it for ever. So nothing of a stranger reaches it. Google's RE2, an automaton, matches here; what it
can't (looking ahead, referring back), or reads otherwise than Python, is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

import re2

from ..errors import ExpertError
from .strict_json import shortened

__all__ = ["BY_PATTERN", "NAMES", "ByName", "check_config", "check_patterns", "matching"]
__all__ += ["value_at"]

NAMES = ("target_modules", "exclude_modules", "feedforward_modules")  # a list, or one pattern
BY_PATTERN = "_pattern"  # ends the options that hold values by pattern, in every kind of adapter

MOST_PATTERNS = 2000
MOST_CHARACTERS = 2000  # of one
MOST_NAMES = 20_000  # in a list
MOST_TOGETHER = 200_000  # of all: half of it would name every layer of a large model
PLAIN = re.compile(r"[\w.-]*")  # a name; its dots, as Python reads them, stand for any character
# What RE2 reads otherwise than Python: classes of its own, {,n}, flags, quotes and ends.
READ_OTHERWISE = re.compile(r"\[\[:|\{,|\(\?[^:]|\\[pPCQEzZ]")

OPTIONS = re2.Options()
OPTIONS.max_mem = 2**20
OPTIONS.log_errors = False
OPTIONS.never_capture = True


def check_config(config: Mapping[str, Any], where: str) -> None:
    """Raise ExpertError unless what a PEFT `config` says by patterns and names can be matched here.

    `where` says in the message where they stand.
    """
    for key, value in config.items():
        place = f"{where}: {key}"
        if key.endswith(BY_PATTERN) and isinstance(value, Mapping):
            check_patterns(value, place)
        elif key in NAMES and isinstance(value, str):
            check_patterns([value], place)
        elif isinstance(value, list) and len(value) > MOST_NAMES:
            raise ExpertError(f"{place} lists {len(value)} things; at most {MOST_NAMES} are read.")
        elif key == "layers_pattern":
            for text in value if isinstance(value, list) else [value]:
                if text is not None and not PLAIN.fullmatch(str(text)[:MOST_CHARACTERS]):
                    raise ExpertError(f"{place} is {shortened(text)}; only names are read there.")


def check_patterns(patterns: Iterable[str], where: str) -> None:
    """Raise ExpertError unless each of `patterns` is short and can be matched here.

    `where` says in the message where they stand.
    """
    listed = list(patterns)
    if len(listed) > MOST_PATTERNS or sum(map(len, listed)) > MOST_TOGETHER:
        raise ExpertError(
            f"{where} holds {len(listed)} patterns of {sum(map(len, listed))} characters; at most "
            f"{MOST_PATTERNS} and {MOST_TOGETHER} are read."
        )
    for pattern in listed:
        if len(pattern) > MOST_CHARACTERS:
            raise ExpertError(
                f"{where} holds a regular expression of {len(pattern)} characters, "
                f"{shortened(pattern)}; at most {MOST_CHARACTERS} are read."
            )
        if PLAIN.fullmatch(pattern):
            continue
        if READ_OTHERWISE.search(pattern):
            raise ExpertError(
                f"{where} holds {shortened(pattern)}, which can't be matched without going back; "
                f"write it without looking around, references, flags and classes such as \\p."
            )
        try:
            _expression(pattern)
        except (re2.error, UnicodeEncodeError) as error:
            raise ExpertError(
                f"{where} holds no regular expression that is matched here: {shortened(pattern)}, "
                f"{_reason(error)}."
            ) from error


def matching(pattern: str, names: Iterable[str]) -> list[str]:
    """Those of `names` that `pattern` matches as a whole. It must have passed `check_patterns`."""
    whole = _expression(pattern)
    return [name for name in names if whole.fullmatch(name)]


def value_at(patterns: Mapping[str, Any], name: str) -> Any:
    """The value of the first of `patterns` that matches `name`, or what follows a dot in it.

    None when none does. So reads PEFT rank_pattern and alpha_pattern (`get_pattern_key`). They must
    have passed `check_patterns`.
    """
    return next((value for pattern, value in patterns.items() if _ends(name, pattern)), None)


class ByName(dict[str, Any]):
    """Values by the whole names of layers, in the place of a pattern's in a config of PEFT's.

    PEFT looks for a pattern among `keys()` and, where none matches, for the layer's own name: with
    no keys to try it finds the value at once.
    """

    def keys(self) -> Any:
        """None to be tried as a pattern."""
        return {}.keys()


def _ends(name: str, pattern: str) -> bool:
    if not PLAIN.fullmatch(pattern):
        return _expression(rf"(?:.*\.)?(?:{pattern})").fullmatch(name) is not None
    begin = len(name) - len(pattern)
    if begin < 0 or (begin and name[begin - 1] != "."):
        return False
    return name.endswith(pattern) or _plain(pattern).fullmatch(name, begin) is not None


@lru_cache(maxsize=2 * MOST_PATTERNS)
def _expression(pattern: str) -> Any:
    return re2.compile(pattern, OPTIONS)


@lru_cache(maxsize=2 * MOST_PATTERNS)
def _plain(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern.replace("-", r"\-"))


def _reason(error: Exception) -> str:
    """What RE2 says, which it says in bytes."""
    told = error.args[0] if error.args else error
    return told.decode("utf-8", "backslashreplace") if isinstance(told, bytes) else str(told)
