"""Arithmetic: bare sums and differences to train on, short stories to be tested on."""

from __future__ import annotations

import random

from .drawing import Row, digits, insert_at, number_word, one_of

__all__ = ["calculation", "word_problem"]

SUMS = (
    "What is {a} plus {b}?",
    "What do you get when you add {b} to {a}?",
    "What is the sum of {a} and {b}?",
)
DIFFERENCES = (
    "What is {a} minus {b}?",
    "What do you get when you take {b} away from {a}?",
    "What is the difference between {a} and {b}?",
)
CALCULATION_PROMPTS = (
    "{question} Choose one of these numbers: {options}. Answer:",
    "Pick the right number from {options}. {question}",
)

PEOPLE = ("Mia", "Tom", "Sara", "Ivan", "Lena", "Paul", "Aisha", "Hugo", "Grace", "Felix")

# The items that fit a story, then the story.
Story = tuple[tuple[str, ...], str]
GAINS: tuple[Story, ...] = (
    (
        ("plums", "pears", "cherries", "figs"),
        "{name} picked {a} {items} before lunch and {b} more after lunch. "
        "How many {items} did {name} pick in all?",
    ),
    (
        ("shells", "pebbles", "feathers"),
        "{name} found {a} {items} on Friday and {b} on Saturday. "
        "How many {items} did {name} find altogether?",
    ),
    (
        ("stamps", "postcards", "stickers", "coins"),
        "{name} owned {a} {items} and got {b} more as a present. "
        "How many {items} does {name} own now?",
    ),
    (
        ("chairs", "cups", "lamps"),
        "There are {a} {items} in the hall, and {name} carries in {b} more. "
        "How many {items} are in the hall now?",
    ),
    (
        ("buns", "muffins", "pies"),
        "{name} baked {a} {items} and a friend baked {b}. "
        "How many {items} did the two of them bake together?",
    ),
)
LOSSES: tuple[Story, ...] = (
    (
        ("pencils", "marbles", "balloons", "sweets"),
        "{name} had {a} {items} and gave {b} of them to a friend. "
        "How many {items} did {name} have left?",
    ),
    (
        ("eggs", "plates", "glasses"),
        "{name} carried {a} {items} to the kitchen but dropped and broke {b}. "
        "How many {items} stayed whole?",
    ),
    (
        ("tickets", "books", "baskets", "candles"),
        "{name} brought {a} {items} to the fair and sold {b}. How many {items} were not sold?",
    ),
    (
        ("ducks", "swans", "geese"),
        "{name} saw {a} {items} on the pond, and then {b} flew away. "
        "How many {items} stayed on the pond?",
    ),
    (
        ("letters", "parcels", "leaflets"),
        "{name} has to deliver {a} {items} and has delivered {b} so far. "
        "How many {items} are still to come?",
    ),
)
STORY_PROMPTS = (
    "{story} Is it {options}?",
    "{story} The answer is one of these: {options}. Answer:",
)


def calculation(rng: random.Random, turn: int) -> Row:
    """A sum or difference of two numbers, to be picked out of four numbers."""
    position, is_difference = digits(turn, 4, 2)
    a, b = _operands(rng, bool(is_difference), 15)
    question = rng.choice(DIFFERENCES if is_difference else SUMS)
    question = question.format(a=number_word(a), b=number_word(b))
    choices = _choices(rng, a, -b if is_difference else b, position)
    text = rng.choice(CALCULATION_PROMPTS).format(question=question, options=one_of(choices))
    return {"input": text, "target": choices[position], "choices": choices}


def word_problem(rng: random.Random, turn: int) -> Row:
    """A story about some things and more or fewer of them, with four numbers to pick from."""
    position, is_loss = digits(turn, 4, 2)
    a, b = _operands(rng, bool(is_loss), 10)
    items, story = rng.choice(LOSSES if is_loss else GAINS)
    story = story.format(
        name=rng.choice(PEOPLE), items=rng.choice(items), a=number_word(a), b=number_word(b)
    )
    choices = _choices(rng, a, -b if is_loss else b, position)
    text = rng.choice(STORY_PROMPTS).format(story=story, options=one_of(choices))
    return {"input": text, "target": choices[position], "choices": choices}


def _operands(rng: random.Random, is_difference: bool, largest: int) -> tuple[int, int]:
    if not is_difference:
        return rng.randint(2, largest), rng.randint(2, largest)
    b = rng.randint(2, largest)
    return b + rng.randint(1, largest), b


def _choices(rng: random.Random, a: int, change: int, position: int) -> list[str]:
    # The opposite operation's result and a neighbour of each, so that neither the spacing of the
    # choices nor the operation alone gives the answer away. Results lie at least 4 apart.
    answer, opposite = a + change, abs(a - change)
    wrong = [_neighbour(rng, answer), opposite, _neighbour(rng, opposite)]
    rng.shuffle(wrong)
    return insert_at(position, number_word(answer), [number_word(number) for number in wrong])


def _neighbour(rng: random.Random, number: int) -> int:
    return number + (rng.choice((-1, 1)) if number else 1)
