"""What scores are usual on neutral text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from phatgoose.errors import ConfigError
from phatgoose.sites import Site, find_sites
from phatgoose.tasks.batching import Collator, read_pairs
from phatgoose.tasks.encoding import Encoder
from phatgoose.tasks.task import Example

PASSAGES = Path(__file__).with_name("neutral.txt")  # separated by empty lines
Moments = Mapping[str, tuple[Tensor, Tensor]]  # mean and deviation [m] by site


def neutral_examples() -> list[Example]:
    """Forty passages of many kinds that belong to no task, the same for everybody.

    Each is cut in two at the space nearest its middle: input and target.
    """
    examples = []
    for passage in PASSAGES.read_text(encoding="utf-8").strip().split("\n\n"):
        spaces = [place for place, letter in enumerate(passage) if letter.isspace()]
        middle = min(spaces, key=lambda place: abs(place - len(passage) / 2))
        examples.append(Example(passage[:middle].rstrip(), passage[middle:].lstrip()))
    return examples


def over_neutral_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    names: Iterable[str],
    numbers: Callable[[str, Tensor], Tensor],
) -> Moments:
    """Mean and deviation over the passages' tokens of some numbers, float32 [m] each, by site.

    `numbers(name, u)` [tokens, m] are those for the inputs u [tokens, n] of a site. A site that no
    token reaches, inside one of the base's own experts, has 0 and 1. Raises ConfigError without a
    tokenizer.
    """
    if tokenizer is None:
        raise ConfigError("This router reads neutral text; hand the base over with its tokenizer.")
    every = find_sites(model)
    sites = {name: every[name] for name in names}
    sums: dict[str, Tensor] = {}

    def see(site: Site, u: Tensor) -> None:
        exact = numbers(site.name, u).double()
        ones = torch.ones_like(exact)
        found = torch.stack([each.sum(dim=0) for each in (ones, exact, exact.square())])
        sums[site.name] = sums.get(site.name, 0) + found.cpu()

    for site in sites.values():
        see(site, torch.zeros(0, site.in_features))
    pairs = Encoder.for_model(model, tokenizer).pairs(neutral_examples())
    read_pairs(model, sites.values(), pairs, Collator(model, tokenizer.pad_token_id), see)
    found = {}
    for name in sites:
        count, total, squares = sums[name]
        mean = total / count.clamp(min=1)
        variance = (squares / count.clamp(min=1) - mean.square()).clamp(min=0)
        deviation = variance.sqrt().masked_fill(count == 0, 1.0)
        found[name] = mean.float(), deviation.float()
    return found
