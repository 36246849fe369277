"""Sentiment: film and product reviews to train on, hotel comments to be tested on."""

from __future__ import annotations

import random
from typing import NamedTuple

from .drawing import Row, digits

__all__ = ["hotel_comment", "review"]


class Aspect(NamedTuple):
    """Something one can praise or blame; each remark completes a sentence about the subject."""

    subject: str
    praise: tuple[str, ...]
    blame: tuple[str, ...]


class Topic(NamedTuple):
    """What an opinion is about. `leads` and `endings` hold the favourable ones, then the others."""

    things: tuple[str, ...]
    leads: tuple[tuple[str, ...], tuple[str, ...]]
    aspects: tuple[Aspect, ...]
    endings: tuple[tuple[str, ...], tuple[str, ...]]


FILM = Topic(
    things=(
        "film",
        "comedy",
        "thriller",
        "drama",
        "western",
        "musical",
        "war film",
        "detective film",
        "horror film",
        "love story",
    ),
    leads=(
        (
            "I expected little from this {thing}, but",
            "What a lovely surprise this {thing} was:",
            "My whole family enjoyed this {thing}, because",
            "I have already watched this {thing} twice, since",
        ),
        (
            "I expected a lot from this {thing}, but",
            "What a letdown this {thing} was:",
            "Nobody in my family enjoyed this {thing}, because",
            "I switched this {thing} off halfway, since",
        ),
    ),
    aspects=(
        Aspect(
            "the acting",
            ("was superb", "was full of warmth", "convinced me completely"),
            ("was wooden", "was painfully flat", "never convinced me"),
        ),
        Aspect(
            "the plot",
            ("kept me guessing", "was clever and fresh", "was gripping throughout"),
            ("made no sense", "was dull and predictable", "dragged throughout"),
        ),
        Aspect(
            "the music",
            ("was beautiful", "lifted every scene"),
            ("was grating", "spoiled every scene"),
        ),
        Aspect(
            "the dialogue",
            ("was witty", "sounded natural"),
            ("was clumsy", "sounded fake"),
        ),
        Aspect(
            "the ending",
            ("moved me to tears", "was deeply satisfying"),
            ("was a mess", "felt rushed and pointless"),
        ),
        Aspect(
            "the main character",
            ("was easy to love", "was charming"),
            ("was impossible to like", "was irritating"),
        ),
        Aspect(
            "the camera work",
            ("was stunning", "was a joy to look at"),
            ("was shaky and ugly", "gave me a headache"),
        ),
    ),
    endings=(
        ("I would watch it again tomorrow.", "Do go and see it.", "It is worth every minute."),
        ("I would not watch it again.", "Do not bother with it.", "It is a waste of an evening."),
    ),
)

PRODUCT = Topic(
    things=(
        "kettle",
        "backpack",
        "desk lamp",
        "vacuum cleaner",
        "office chair",
        "coffee grinder",
        "tent",
        "keyboard",
        "toaster",
        "electric drill",
        "suitcase",
        "raincoat",
    ),
    leads=(
        (
            "This {thing} has made my life easier:",
            "I am delighted with this {thing}, because",
            "I had doubts about this {thing}, but",
            "I would buy this {thing} again, because",
        ),
        (
            "This {thing} has caused nothing but trouble:",
            "I regret buying this {thing}, because",
            "I had high hopes for this {thing}, but",
            "I sent this {thing} back after two days, because",
        ),
    ),
    aspects=(
        Aspect(
            "the build quality",
            ("is excellent", "is better than I hoped"),
            ("is dreadful", "is worse than I feared"),
        ),
        Aspect(
            "the instructions",
            ("were clear and short", "were easy to follow"),
            ("were full of mistakes", "were impossible to follow"),
        ),
        Aspect(
            "the material",
            ("feels solid", "is of top quality"),
            ("feels flimsy", "smells of cheap plastic"),
        ),
        Aspect(
            "the delivery",
            ("came a day early", "was quick and careful"),
            ("came three weeks late", "was slow and careless"),
        ),
        Aspect(
            "the customer service",
            ("was friendly", "answered within an hour"),
            ("was rude", "never answered my messages"),
        ),
        Aspect(
            "the price",
            ("was very fair", "was a bargain"),
            ("was far too high", "was a rip-off"),
        ),
        Aspect(
            "the design",
            ("is clever", "is neat and practical"),
            ("is clumsy", "is ugly and impractical"),
        ),
    ),
    endings=(
        ("I recommend it to everyone.", "Five stars from me.", "It was money well spent."),
        ("I cannot recommend it to anyone.", "One star from me.", "It was money thrown away."),
    ),
)

HOTEL = Topic(
    things=("stay", "weekend", "holiday", "visit"),
    leads=(
        (
            "Our {thing} went even better than planned:",
            "We remember our {thing} with a smile, since",
            "The weather was awful during our {thing}, but",
        ),
        (
            "Our {thing} went wrong from the first hour:",
            "We cut our {thing} short by a day, since",
            "The weather was glorious during our {thing}, but",
        ),
    ),
    aspects=(
        Aspect(
            "the room",
            ("was spotless", "had a wonderful view of the bay"),
            ("smelled of smoke", "was dirty and cramped"),
        ),
        Aspect(
            "the bed",
            ("was soft and warm", "gave us a perfect night"),
            ("creaked all night", "was as hard as stone"),
        ),
        Aspect(
            "the breakfast",
            ("was fresh and generous", "had something for everyone"),
            ("was cold and stale", "ran out before eight"),
        ),
        Aspect(
            "the staff",
            ("were kind and helpful", "remembered our names"),
            ("ignored us", "were grumpy and unhelpful"),
        ),
        Aspect(
            "the pool",
            ("was clean and quiet", "was pleasantly warm"),
            ("was closed for repairs", "was full of leaves"),
        ),
        Aspect(
            "the shower",
            ("had plenty of hot water", "worked perfectly"),
            ("never got warm", "leaked onto the floor"),
        ),
        Aspect(
            "the bill",
            ("was lower than expected", "included free parking"),
            ("was full of hidden charges", "was higher than agreed"),
        ),
    ),
    endings=(
        ("We will be back next summer.", "Our friends should come here too."),
        ("We will stay elsewhere next summer.", "Our friends should keep away."),
    ),
)

REVIEW_PROMPTS = (
    "Review: {opinion} Is this review {first} or {second}?",
    "{opinion} Is the writer's opinion {first} or {second}? Answer:",
    "Read the review and label it {first} or {second}. {opinion} Answer:",
)
HOTEL_PROMPTS = (
    'A hotel guest wrote: "{opinion}" Was the guest {first} or {second}?',
    'Comment card from room twelve: "{opinion}" How did the guest feel, {first} or {second}?',
)


def review(rng: random.Random, turn: int) -> Row:
    """A film or product review to be labelled positive or negative."""
    label, position, topic = digits(turn, 2, 2, 2)
    opinion = _opinion(rng, (FILM, PRODUCT)[topic], label)
    return _row(rng.choice(REVIEW_PROMPTS), opinion, ("positive", "negative"), label, position)


def hotel_comment(rng: random.Random, turn: int) -> Row:
    """A hotel guest's comment, to be read as that of a pleased or a disappointed guest."""
    label, position = digits(turn, 2, 2)
    opinion = _opinion(rng, HOTEL, label)
    return _row(rng.choice(HOTEL_PROMPTS), opinion, ("pleased", "disappointed"), label, position)


def _opinion(rng: random.Random, topic: Topic, label: int) -> str:
    lead = rng.choice(topic.leads[label]).format(thing=rng.choice(topic.things))
    remarks = [
        f"{aspect.subject} {rng.choice((aspect.praise, aspect.blame)[label])}"
        for aspect in rng.sample(topic.aspects, 2)
    ]
    return f"{lead} {remarks[0]} and {remarks[1]}. {rng.choice(topic.endings[label])}"


def _row(prompt: str, opinion: str, labels: tuple[str, str], label: int, position: int) -> Row:
    target = labels[label]
    choices = [target, labels[1 - label]]
    if position:
        choices.reverse()
    text = prompt.format(opinion=opinion, first=choices[0], second=choices[1])
    return {"input": text, "target": target, "choices": choices}
