"""Ordering: sizes, numbers, durations and the alphabet to train on, time to be tested on."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

from .drawing import Row, digits, number_word, with_article

__all__ = ["comparison", "which_first"]

Stage = TypeVar("Stage")


class Scale(NamedTuple):
    """Things in order: whatever stands in one tier comes before whatever stands in a later one.

    `earlier` and `later` finish the question "Which one ...?".
    """

    kind: str
    earlier: str
    later: str
    tiers: Sequence[Sequence[str]]


SIZE = Scale(
    "things to compare by their usual size",
    "is smaller",
    "is larger",
    (
        ("an ant", "a ladybird", "a grain of rice", "a pea", "a flea"),
        ("a mouse", "an egg", "a key", "a walnut", "a teaspoon"),
        ("a cat", "a kettle", "a football", "a pillow", "a rabbit"),
        ("a horse", "a sofa", "a piano", "a cow", "a wardrobe"),
        ("a bus", "a house", "a fire engine", "a whale", "an airliner"),
        ("a mountain", "an island", "a city", "a desert", "an ocean"),
    ),
)
UNITS = ("second", "minute", "hour", "day", "week", "month", "year", "decade", "century")
NUMBER = Scale(
    "numbers to compare by value",
    "is smaller",
    "is larger",
    [[number_word(number)] for number in range(1, 100)],
)
DURATION = Scale(
    "lengths of time to compare",
    "is shorter",
    "is longer",
    [[with_article(unit)] for unit in UNITS],
)
ALPHABET = Scale(
    "words to look up in a dictionary",
    "comes earlier in the alphabet",
    "comes later in the alphabet",
    (
        ("apple", "anchor", "arrow"),
        ("banana", "bottle", "button"),
        ("candle", "curtain", "circus"),
        ("dragon", "doctor", "dinner"),
        ("engine", "elbow", "evening"),
        ("forest", "finger", "fable"),
        ("garden", "glove", "guitar"),
        ("hammer", "honey", "hotel"),
        ("jacket", "jungle", "jewel"),
        ("kitchen", "kitten", "kingdom"),
        ("lemon", "ladder", "letter"),
        ("magnet", "mirror", "meadow"),
        ("needle", "napkin", "number"),
        ("pencil", "planet", "pocket"),
        ("rabbit", "river", "ribbon"),
        ("saddle", "silver", "summer"),
        ("table", "tiger", "tunnel"),
        ("valley", "violin", "village"),
        ("window", "winter", "wagon"),
        ("zebra", "zipper", "zone"),
    ),
)
COMPARISON_PROMPTS = (
    "Here are two {kind}. Which one {phrase}, {first} or {second}?",
    "Here are two {kind}: {first} and {second}. Which one {phrase}? Answer:",
)

# A stretch of time, then what happens in it, in order.
Course = tuple[str, Sequence[str]]
WEEK: Course = (
    "a week that starts on Monday",
    ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
)
YEAR: Course = (
    "a year from its first day to its last",
    (
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ),
)
EVENTS: tuple[Course, ...] = (
    (
        "someone baking bread",
        ("mixing the dough", "shaping the loaf", "baking the loaf", "eating a slice"),
    ),
    (
        "someone growing tomatoes",
        ("sowing the seeds", "watering the seedlings", "picking the tomatoes", "making a salad"),
    ),
    (
        "someone sending a letter",
        ("writing the letter", "sealing the envelope", "posting the letter", "getting a reply"),
    ),
    (
        "a normal day",
        ("waking up", "having lunch", "cooking dinner", "falling asleep"),
    ),
    (
        "a journey by train",
        ("buying a ticket", "boarding the train", "finding a seat", "getting off"),
    ),
    (
        "someone building a house",
        ("drawing the plans", "laying the foundations", "putting up the walls", "moving in"),
    ),
    (
        "an evening at the theatre",
        ("the curtain rising", "the interval", "the last scene", "the final applause"),
    ),
    (
        "a long human life",
        ("learning to walk", "starting school", "finding a job", "retiring from work"),
    ),
    (
        "someone doing the laundry",
        ("sorting the clothes", "washing the clothes", "hanging up the clothes", "ironing a shirt"),
    ),
    (
        "someone visiting the doctor",
        ("making an appointment", "sitting in the waiting room", "seeing the doctor", "recovering"),
    ),
    (
        "someone painting a door",
        ("choosing a colour", "opening the tin", "brushing on the paint", "letting it dry"),
    ),
    (
        "the life of a butterfly",
        ("lying in an egg", "crawling as a caterpillar", "resting in a cocoon", "spreading wings"),
    ),
)
WHICH_FIRST_PROMPTS = (
    "Think of {course}. Between {first} and {second}, which comes first?",
    "Picture {course}. Which of these two is first: {first} or {second}? Answer:",
)


def comparison(rng: random.Random, turn: int) -> Row:
    """Two things on one scale, and the question which one comes earlier, or later, on it."""
    position, is_later, scale_index = digits(turn, 2, 2, 4)
    scale = (SIZE, NUMBER, DURATION, ALPHABET)[scale_index]
    pair = [rng.choice(tier) for tier in _in_order(rng, scale.tiers)]
    target = pair[is_later]
    if pair.index(target) != position:
        pair.reverse()
    text = rng.choice(COMPARISON_PROMPTS).format(
        kind=scale.kind,
        phrase=scale.later if is_later else scale.earlier,
        first=pair[0],
        second=pair[1],
    )
    return {"input": text, "target": target, "choices": pair}


def which_first(rng: random.Random, turn: int) -> Row:
    """Two events, days or months, and the question which one comes first."""
    position, kind = digits(turn, 2, 4)
    # Half of the rows are about events, the kind with the most to tell apart.
    course, stages = (WEEK, YEAR, rng.choice(EVENTS), rng.choice(EVENTS))[kind]
    pair = _in_order(rng, stages)
    target = pair[0]
    if position:
        pair.reverse()
    text = rng.choice(WHICH_FIRST_PROMPTS).format(course=course, first=pair[0], second=pair[1])
    return {"input": text, "target": target, "choices": pair}


def _in_order(rng: random.Random, ladder: Sequence[Stage]) -> list[Stage]:
    return [ladder[index] for index in sorted(rng.sample(range(len(ladder)), 2))]
