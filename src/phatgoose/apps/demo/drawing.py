"""What all demo tasks share: drawing balanced, distinct rows, and small points of English."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

__all__ = [
    "Composer",
    "Row",
    "digits",
    "draw_rows",
    "insert_at",
    "number_word",
    "one_of",
    "with_article",
]

Row = dict[str, Any]
Composer = Callable[[random.Random, int], Row]

ONES = (
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
)
TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")

# Words that start with one kind of letter and the other kind of sound.
SOUNDS_LIKE_CONSONANT = ("ukulele", "unicycle")
SOUNDS_LIKE_VOWEL = ("hour",)


def draw_rows(compose: Composer, count: int, rng: random.Random) -> list[Row]:
    """`count` rows with distinct inputs, shuffled.

    `compose` gets the number of rows so far as its turn. It takes the label and the place of the
    right answer from that turn (see `digits`) and all else from `rng`.
    """
    rows: dict[str, Row] = {}
    while len(rows) < count:
        row = compose(rng, len(rows))
        rows.setdefault(row["input"], row)
    drawn = list(rows.values())
    rng.shuffle(drawn)
    return drawn


def digits(turn: int, *sizes: int) -> list[int]:
    """One index below each size; consecutive turns count through all combinations equally often."""
    indices = []
    for size in sizes:
        turn, index = divmod(turn, size)
        indices.append(index)
    return indices


def insert_at(position: int, right: str, wrong: Sequence[str]) -> list[str]:
    """The choices: the wrong answers in order, with the right one at `position`."""
    return [*wrong[:position], right, *wrong[position:]]


def one_of(words: Sequence[str]) -> str:
    """The words as an English list of alternatives: "a, b, c or d"."""
    return f"{', '.join(words[:-1])} or {words[-1]}"


def with_article(noun: str) -> str:
    """The noun with "a" or "an" before it."""
    vowel = noun[0] in "aeiou" or noun.startswith(SOUNDS_LIKE_VOWEL)
    return f"an {noun}" if vowel and not noun.startswith(SOUNDS_LIKE_CONSONANT) else f"a {noun}"


def number_word(number: int) -> str:
    """A number from 0 to 99 in words, such as "twenty-one"."""
    if number < len(ONES):
        return ONES[number]
    tens, ones = divmod(number, 10)
    return f"{TENS[tens - 2]}-{ONES[ones]}" if ones else TENS[tens - 2]
