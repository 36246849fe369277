"""Prompts that belong to one expert each, and what that expert alone makes of them."""

from collections.abc import Sequence

import pytest
from torch import Tensor

from phatgoose.experts.pool import Pool
from phatgoose.routing.choice import Choice
from phatgoose.routing.compose import compose, composition_of, detach
from phatgoose.tasks.batching import pad_left, pad_right
from phatgoose.tasks.task import Example, Task

PROMPTS = ("plums or apples", "5 + 6 = 11, 1 + 9", "WHO? WHAT? WHERE?", "zigzag jazz;", "apples")
OWNERS = ("e0", "e1", "e2", "e3", "e0")  # of the topics nearest to them

CHOOSING = Task(
    "choosing",
    test=(
        Example("plums or apples", "pears", ("pears", "plums, apples")),
        Example("plums or apples", "5 + 6", ("1 + 2 = 3, 4 + 5 = 9", "5 + 6", "= 12 + 3")),
        Example("5 + 6 = 11, 1 + 9", "10", ("10", "1 + 0", "3", "4")),
        Example("say", "WHO?", ("WHO?", "WHAT? WHY? WHO?")),
        Example("zigzag jazz; zigzag jazz", "quiz", ("jazz", "quiz", "zigzag")),
    ),
)

SHOUTS, SUMS = "WHO? WHAT? WHERE? WHY? " * 9, "5 + 6 = 11, 1 + 9 = 10; " * 9
BEFORE = {  # what chats begin with that then ask one of PROMPTS, (role, content) each
    "nothing": [],
    "a system prompt": [("system", SHOUTS)],
    "tools": [("system", '[{"type": "function", "name": "WHO"}]' * 9)],
    "earlier turns": [("user", SUMS), ("assistant", "11"), ("user", SHOUTS), ("assistant", "I.")],
}

OPEN = Task("open", test=tuple(Example(prompt, "no") for prompt in PROMPTS))

both_streams = pytest.mark.parametrize("kind", ["llama", "t5"], indirect=True)
retrieving = pytest.mark.usefixtures("toy_embedder")


def batch_of(base, texts) -> tuple[Tensor, Tensor]:
    """Token ids and mask, padded as the base is used to."""
    rows = [base.tokenizer(text)["input_ids"] for text in texts]
    pad = pad_right if base.is_encoder_decoder else pad_left
    return pad(rows, 0), pad([[1] * len(row) for row in rows], 0)


def by_single(base, pool: Pool, names, run) -> list:
    """`run(model, place)` for each of the names, with that expert alone."""
    results = []
    for place, name in enumerate(names):
        results.append(run(compose(pool, base, router=f"single:expert={name}"), place))
        detach(base.model)
    return results


def tokens_of(model, texts: Sequence[str]) -> list[list[int]]:
    """The prompts' tokens, as the routed `model` reads them."""
    return [list(composition_of(model).tokenizer(text)["input_ids"]) for text in texts]


def experts_of(model, texts: Sequence[str]) -> Choice:
    """The experts that the routed `model` chooses for these prompts."""
    return composition_of(model).chooser.choose(tokens_of(model, texts))


def scores_of(model, texts: Sequence[str]) -> Tensor:
    """The scores that the router of `model` gives all experts for these prompts."""
    return composition_of(model).chooser.score(tokens_of(model, texts))
