"""Regular expressions that strangers wrote: refused when matching one could take for ever.

Python's matcher backtracks: with a choice inside a repetition it can take a time exponential in
the length of what is matched, with many repetitions one after the other a high power of it.
PEFT matches the patterns of an adapter's config against the names of a model's layers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from .errors import ExpertError

__all__ = ["check_patterns"]

MOST_PATTERNS = 5000
MOST_CHARACTERS = 2000
MOST_REPETITIONS = 4  # names have some 60 characters; 60^5 steps, PEFT's own ".*" included, are few

TOKEN = re.compile(
    r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|[()]|[*+]|\{\d*,?\d*\}|\?|.", re.DOTALL
)  # an escape, a class, a bracket, a repetition, anything else


def check_patterns(patterns: Iterable[str], where: str) -> None:
    """Raise ExpertError unless each of `patterns` compiles and is quickly matched.

    `where` says in the message where they stand.
    """
    listed = list(patterns)
    if len(listed) > MOST_PATTERNS:
        raise ExpertError(
            f"{where} holds {len(listed)} patterns; at most {MOST_PATTERNS} are read."
        )
    for pattern in listed:
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise ExpertError(f"{where} holds no regular expression: {error}.") from error
        if len(pattern) > MOST_CHARACTERS or _is_slow(pattern):
            raise ExpertError(
                f"{where} holds a regular expression that could take for ever to match: "
                f"{pattern[:60]!r}."
            )


def _is_slow(pattern: str) -> bool:
    """True with a choice (repetition or alternative) inside a repeated group, or with many."""
    repetitions, before = 0, ""
    groups = [False]  # whether each open group, outermost first, holds a choice
    closed = False  # whether the token before closed a group that holds one
    for token in TOKEN.findall(pattern):
        optional = token == "?" and before not in ("", "(", "*", "+", "?", "}")
        if token in ("*", "+") or optional or (token.startswith("{") and token != "{"):
            if closed:
                return True
            repetitions += 1
            groups[-1] = True
        groups[-1] = groups[-1] or token == "|"
        if token == "(":
            groups.append(False)
        closed = False
        if token == ")" and len(groups) > 1:
            closed = groups.pop()
            groups[-1] = groups[-1] or closed
        before = token[-1]
    return repetitions > MOST_REPETITIONS
