"""Neutral text: forty passages of many kinds, the same for everybody, that belong to no task."""

from __future__ import annotations

from pathlib import Path

from .task import Example

PASSAGES = Path(__file__).with_name("neutral.txt")  # separated by empty lines


def neutral_examples() -> list[Example]:
    """The passages, each cut in two at the space nearest its middle: input and target."""
    examples = []
    for passage in PASSAGES.read_text(encoding="utf-8").strip().split("\n\n"):
        spaces = [place for place, letter in enumerate(passage) if letter.isspace()]
        middle = min(spaces, key=lambda place: abs(place - len(passage) / 2))
        examples.append(Example(passage[:middle].rstrip(), passage[middle:].lstrip()))
    return examples
