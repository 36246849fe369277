"""Untrusted regular expressions, matched in linear time.

PEFT matches patterns from an adapter's config with Python's backtracking matcher, which a few
nested repetitions can keep busy for ever. Google's RE2 matches here instead. Patterns that RE2
can't match, or reads differently from Python, are refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

import re2

from ..errors import ExpertError
from .strict import one_line, shortened

NAMES = ("target_modules", "exclude_modules", "feedforward_modules")  # a list, or one pattern
BY_PATTERN = "_pattern"  # suffix of the options that map patterns to values

MOST_PATTERNS = 2000
MOST_CHARACTERS = 2000  # of one pattern
MOST_NAMES = 20_000  # in a list
MOST_TOGETHER = 200_000  # of all patterns: half of it names every layer of a large model
PLAIN = re.compile(r"[\w.-]*")  # a name; in a pattern its dots match any character
# What RE2 reads differently from Python: its own classes, {,n}, flags, quoting and anchors.
READ_DIFFERENTLY = re.compile(r"\[\[:|\{,|\(\?[^:]|\\[pPCQEzZ]")

OPTIONS = re2.Options()
OPTIONS.max_mem = 2**20
OPTIONS.log_errors = False
OPTIONS.never_capture = True


def check_config(config: Mapping[str, Any], where: str) -> None:
    """Raise ExpertError, naming `where`, unless all patterns and names of a PEFT `config` are
    matchable.
    """
    for key, value in config.items():
        place = f"{where}: {key}"
        if key.endswith(BY_PATTERN) and isinstance(value, Mapping):
            check_patterns(value, place)
        elif key in NAMES and isinstance(value, str):
            check_patterns([value], place)
        elif isinstance(value, list) and len(value) > MOST_NAMES:
            raise ExpertError(f"{place} lists {len(value)} values; at most {MOST_NAMES} are read.")
        elif key == "layers_pattern":
            for text in value if isinstance(value, list) else [value]:
                if text is not None and not PLAIN.fullmatch(str(text)[:MOST_CHARACTERS]):
                    raise ExpertError(f"{place} is {shortened(text)}, but must be a plain name.")


def check_patterns(patterns: Iterable[str], where: str) -> None:
    """Raise ExpertError unless all `patterns`, which `where` holds, match in linear time."""
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
        if READ_DIFFERENTLY.search(pattern):
            raise ExpertError(
                f"{where} holds {shortened(pattern)}, which can't be matched in linear time; "
                f"write it without look-around, references, flags and classes such as \\p."
            )
        try:
            _expression(pattern)
        except (re2.error, UnicodeEncodeError) as error:
            raise ExpertError(
                f"{where} holds no regular expression that RE2 can match: {shortened(pattern)}, "
                f"{_reason(error)}."
            ) from error


def matching(pattern: str, names: Iterable[str]) -> list[str]:
    """The `names` that `pattern` matches in full. It must have passed `check_patterns`."""
    whole = _expression(pattern)
    return [name for name in names if whole.fullmatch(name)]


def value_at(patterns: Mapping[str, Any], name: str) -> Any:
    """The value of the first of `patterns` that matches `name` or its end after a dot, else None.

    As PEFT reads rank_pattern and alpha_pattern (`get_pattern_key`).
    """
    return next((value for pattern, value in patterns.items() if _ends(name, pattern)), None)


class ByName(dict[str, Any]):
    """Values by full layer names, in place of values by pattern in a PEFT config."""

    def keys(self) -> Any:
        # PEFT tries each key as a pattern and then looks up the layer's own name: without keys it
        # finds the value at once.
        return {}.keys()


def _ends(name: str, pattern: str) -> bool:
    if not PLAIN.fullmatch(pattern):
        return _expression(rf"(?:.*\.)?(?:{pattern})").fullmatch(name) is not None
    begin = len(name) - len(pattern)
    if begin < 0 or (begin and name[begin - 1] != "."):
        return False
    # To PEFT a plain name is a pattern, too, whose dots match any character.
    return name.endswith(pattern) or _plain(pattern).fullmatch(name, begin) is not None


@lru_cache(maxsize=2 * MOST_PATTERNS)
def _expression(pattern: str) -> Any:
    return re2.compile(pattern, OPTIONS)


@lru_cache(maxsize=2 * MOST_PATTERNS)
def _plain(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern.replace("-", r"\-"))


def _reason(error: Exception) -> str:
    message = error.args[0] if error.args else error
    # RE2's messages are bytes, and quote the pattern.
    if isinstance(message, bytes):
        message = message.decode("utf-8", "backslashreplace")
    return one_line(message, 80)
