"""Entailment: premise and hypothesis to train on, passage and statement to be tested on."""

from __future__ import annotations

import random

from .drawing import Row, digits

__all__ = ["passage_and_statement", "premise_and_hypothesis"]

# A premise, something that follows from it, and something that it rules out.
Inference = tuple[str, str, str]

PEOPLE = (
    "Nina",
    "Omar",
    "Julia",
    "Peter",
    "Carmen",
    "Daniel",
    "Yuki",
    "Robert",
    "Emma",
    "Karim",
    "Olga",
    "Simon",
)
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
DEALS = ("bought", "sold", "found", "lost")
PLACES = (
    "the market",
    "the station",
    "the airport",
    "the harbour",
    "the school fair",
    "the village hall",
    "the park",
    "the town square",
)
GOODS = {
    "a musical instrument": ("a violin", "a drum", "a flute", "a guitar"),
    "a piece of clothing": ("a coat", "a scarf", "a jacket", "a jumper"),
    "something to read": ("a novel", "a newspaper", "a comic", "a guidebook"),
    "a tool": ("a hammer", "a saw", "a screwdriver", "an axe"),
    "a toy": ("a kite", "a doll", "a toy train", "a spinning top"),
    "a piece of jewellery": ("a ring", "a necklace", "a bracelet", "an earring"),
    "some fruit": ("a melon", "a bag of cherries", "a crate of apples", "a bunch of grapes"),
}
CONTRASTS = (
    ("taller", "shorter"),
    ("older", "younger"),
    ("faster", "slower"),
    ("stronger", "weaker"),
    ("richer", "poorer"),
    ("louder", "quieter"),
)
SITUATIONS: tuple[Inference, ...] = (
    (
        "{a} missed the last bus and walked home.",
        "{a} went home on foot.",
        "{a} went home by bus.",
    ),
    ("{a} drank all of the milk.", "There is no milk left.", "There is still some milk left."),
    ("{a} had no umbrella and was soaked.", "{a} got wet.", "{a} stayed dry."),
    (
        "{a} finished the race before everyone else.",
        "{a} won the race.",
        "{a} came last in the race.",
    ),
    ("{a} took the exam and failed.", "{a} did not pass the exam.", "{a} passed the exam."),
    (
        "{a} reached the cinema after the film had started.",
        "{a} was late for the film.",
        "{a} was early for the film.",
    ),
    ("{a} is fast asleep on the sofa.", "{a} is not awake.", "{a} is wide awake."),
    ("{a} dropped the vase, and it broke.", "The vase is damaged.", "The vase is unharmed."),
    (
        "{a} speaks French, Greek and Dutch.",
        "{a} knows more than one language.",
        "{a} knows only one language.",
    ),
    ("{a} sold the car last week.", "{a} no longer owns the car.", "{a} still owns the car."),
    (
        "{a} turned off every lamp in the house.",
        "None of the lamps is on.",
        "One of the lamps is still on.",
    ),
    (
        "{a} is the youngest of four children.",
        "{a} is not an only child.",
        "{a} has a younger sister.",
    ),
    (
        "{a} cannot swim and stayed on the beach.",
        "{a} kept out of the sea.",
        "{a} swam in the sea.",
    ),
    (
        "{a} ate nothing at all before noon.",
        "{a} skipped breakfast.",
        "{a} had a big breakfast.",
    ),
    ("{a} paid for the meal with coins.", "{a} paid in cash.", "{a} paid by card."),
    ("{a} painted the white fence green.", "The fence is green now.", "The fence is white now."),
    ("{a} has just locked the front door.", "The door is shut.", "The door is wide open."),
    ("{a} lent the only ladder to {b}.", "{b} has the ladder.", "{b} has never had the ladder."),
    ("{a} taught {b} how to play chess.", "{b} learned a game.", "{b} was the teacher of {a}."),
    ("{a} and {b} have the same parents.", "{a} and {b} are siblings.", "{a} and {b} are cousins."),
)
HYPOTHESIS_PROMPTS = (
    "Premise: {premise} Hypothesis: {hypothesis} Does the hypothesis follow, {first} or {second}?",
    "{premise} Can we conclude the following? {hypothesis} Reply with {first} or {second}. Answer:",
    "We know this: {premise} Someone claims: {hypothesis} Is that right, {first} or {second}?",
)

VENUES = ("museum", "library", "swimming pool", "bakery", "post office", "castle", "bank")
ANIMALS = ("goats", "bees", "rabbits", "sheep", "hens", "ponies", "geese", "pigs")
LANDMARKS = ("mill", "bridge", "chapel", "quarry", "lighthouse", "windmill", "old farm", "campsite")
DIRECTIONS = (("north", "south"), ("south", "north"), ("east", "west"), ("west", "east"))
REPORTS: tuple[Inference, ...] = (
    (
        "Most of the snow had melted by April, but the mountain road stayed closed until June.",
        "Nobody could use the mountain road in May.",
        "The mountain road was open in April.",
    ),
    (
        "The old clock in the tower has not moved since the storm ten years ago.",
        "The clock in the tower does not work.",
        "The clock in the tower shows the right time.",
    ),
    (
        "Every seat on the morning ferry was taken, so twenty people had to wait on the pier.",
        "The morning ferry was full.",
        "The morning ferry had plenty of empty seats.",
    ),
    (
        "The bakery's ovens broke down last night, and no bread was baked this morning.",
        "The bakery had no fresh bread this morning.",
        "The bakery baked more bread than usual this morning.",
    ),
    (
        "The village had a single school until a second one was built beside the park.",
        "The village now has two schools.",
        "The village has never had more than one school.",
    ),
    (
        "Desert foxes sleep in their burrows all day and hunt after sunset.",
        "Desert foxes look for food at night.",
        "Desert foxes hunt in the midday sun.",
    ),
    (
        "The new bridge is twice as long as the old one, which was pulled down in spring.",
        "The old bridge was shorter than the new one.",
        "The old bridge is still standing.",
    ),
    (
        "All the tickets for the concert were sold within an hour, and none were returned.",
        "The concert was sold out.",
        "Some tickets for the concert were never sold.",
    ),
    (
        "The lake froze in December, and people skated on it until the thaw in March.",
        "The lake was covered in ice in January.",
        "There was no ice on the lake in February.",
    ),
    (
        "The farmer sold half of the twelve cows and kept the rest.",
        "The farmer still has six cows.",
        "The farmer has no cows any more.",
    ),
)
STATEMENT_PROMPTS = (
    "{premise} Statement: {hypothesis} Is the statement {first} or {second}?",
    "Read this passage. {premise} {first} or {second}: {hypothesis} Answer:",
)


def premise_and_hypothesis(rng: random.Random, turn: int) -> Row:
    """A premise and a hypothesis that follows from it (yes) or contradicts it (no)."""
    label, position, kind = digits(turn, 2, 2, 4)
    inference = (_deal, _comparison, _situation, _deal)[kind](rng)
    return _row(rng.choice(HYPOTHESIS_PROMPTS), inference, ("yes", "no"), label, position)


def passage_and_statement(rng: random.Random, turn: int) -> Row:
    """A passage and a statement about it that is True or False."""
    label, position, kind = digits(turn, 2, 2, 4)
    inference = (_opening_hours, _keepers, _map, _report)[kind](rng)
    return _row(rng.choice(STATEMENT_PROMPTS), inference, ("True", "False"), label, position)


def _row(
    prompt: str, inference: Inference, labels: tuple[str, str], label: int, position: int
) -> Row:
    choices = list(labels)
    if label != position:
        choices.reverse()
    text = prompt.format(
        premise=inference[0], hypothesis=inference[1 + label], first=choices[0], second=choices[1]
    )
    return {"input": text, "target": labels[label], "choices": choices}


def _deal(rng: random.Random) -> Inference:
    name, other_name = rng.sample(PEOPLE, 2)
    day, other_day = rng.sample(DAYS, 2)
    place, other_place = rng.sample(PLACES, 2)
    kind, other_kind = rng.sample(list(GOODS), 2)
    item, deal = rng.choice(GOODS[kind]), rng.choice(DEALS)
    premise = f"On {day} {name} {deal} {item} at {place}."
    return rng.choice(
        (
            (premise, f"{name} {deal} {kind}.", f"{name} {deal} {other_kind}."),
            (premise, f"It happened at {place}.", f"It happened at {other_place}."),
            (premise, f"It happened on a {day}.", f"It happened on a {other_day}."),
            (
                premise,
                f"The person who {deal} {item} was {name}.",
                f"The person who {deal} {item} was {other_name}.",
            ),
        )
    )


def _comparison(rng: random.Random) -> Inference:
    a, b = rng.sample(PEOPLE, 2)
    more, less = rng.sample(rng.choice(CONTRASTS), 2)
    premise = f"Our neighbour {a} is {more} than {b} is."
    return rng.choice(
        (
            (premise, f"{b} is {less} than {a}.", f"{b} is {more} than {a}."),
            (premise, f"Of the two, {a} is {more}.", f"Of the two, {b} is {more}."),
            (premise, f"Of the two, {b} is {less}.", f"Of the two, {a} is {less}."),
        )
    )


def _situation(rng: random.Random) -> Inference:
    a, b = rng.sample(PEOPLE, 2)
    premise, follows, contradicts = rng.choice(SITUATIONS)
    return premise.format(a=a, b=b), follows.format(a=a, b=b), contradicts.format(a=a, b=b)


def _opening_hours(rng: random.Random) -> Inference:
    venue, (day, other_day) = rng.choice(VENUES), rng.sample(DAYS, 2)
    opening, closing = rng.choice(("eight", "nine", "ten")), rng.choice(("four", "five", "six"))
    passage = f"The {venue} opens at {opening} and closes at {closing}, but on {day} it stays shut."
    return rng.choice(
        (
            (passage, f"The {venue} is closed on {day}.", f"The {venue} is open on {day}."),
            (
                passage,
                f"You can visit the {venue} on {other_day}.",
                f"You can visit the {venue} on {day}.",
            ),
            (
                passage,
                f"At noon on {other_day} the {venue} is open.",
                f"At midnight on {other_day} the {venue} is open.",
            ),
        )
    )


def _keepers(rng: random.Random) -> Inference:
    a, b = rng.sample(PEOPLE, 2)
    first, second = rng.sample(ANIMALS, 2)
    passage = f"{a} keeps {first} behind the barn, while {b}, who lives nearby, keeps {second}."
    return rng.choice(
        (
            (passage, f"The {first} belong to {a}.", f"The {first} belong to {b}."),
            (passage, f"{b} looks after {second}.", f"{b} looks after {first}."),
            (passage, f"{b} is a neighbour of {a}.", f"{b} lives far away from {a}."),
        )
    )


def _map(rng: random.Random) -> Inference:
    first, second = rng.sample(LANDMARKS, 2)
    direction, reverse = rng.choice(DIRECTIONS)
    passage = f"On the map the {first} lies a short walk {direction} of the {second}."
    return rng.choice(
        (
            (
                passage,
                f"The {second} is {reverse} of the {first}.",
                f"The {second} is {direction} of the {first}.",
            ),
            (
                passage,
                f"The {first} and the {second} are close together.",
                f"The {first} and the {second} are many miles apart.",
            ),
        )
    )


def _report(rng: random.Random) -> Inference:
    return rng.choice(REPORTS)
