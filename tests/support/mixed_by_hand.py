"""Several experts at once by hand: hooks that add their weighted updates to the base's outputs."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from oracle import update
from phatgoose.base import Base
from phatgoose.experts.pool import Pool
from phatgoose.tasks.batching import pad_left, pad_right
from tiny import assert_same_logits
from topic_prompts import PROMPTS, passed

Shares = Mapping[str, float]


@contextmanager
def adding(base: Base, pool: Pool, weights: Shares) -> Iterator[None]:
    """The base with the experts of these names, each times its weight, meanwhile."""

    def hook_of(site: str):
        def hook(_: nn.Module, args: tuple[Tensor], y: Tensor) -> Tensor:
            (u,) = args
            tokens = u.reshape(-1, u.shape[-1])
            added = torch.zeros(len(tokens), y.shape[-1], dtype=torch.float64)
            for expert in pool.experts:
                if site in expert.lora and expert.name in weights:
                    rows = torch.stack([update(expert, site, token) for token in tokens])
                    added += weights[expert.name] * rows
            return y + added.view(y.shape).to(y.dtype)

        return hook

    handles = [
        base.model.get_submodule(site).register_forward_hook(hook_of(site)) for site in pool.sites
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def assert_rows_are_mixed(
    base: Base, pool: Pool, compose: Callable[[], PreTrainedModel], shares: Sequence[Shares]
) -> None:
    """PROMPTS padded on either side, through the composed model, are mixtures of these shares."""
    rows, wanted = [base.tokenizer(text)["input_ids"] for text in PROMPTS], []
    for row, weights in zip(rows, shares, strict=True):
        ids = torch.tensor([row])
        with adding(base, pool, weights):
            wanted.append(passed(base, base.model, ids, torch.ones_like(ids)))
    model = compose()
    for pad in (pad_left, pad_right):
        ids, mask = pad(rows, 0), pad([[1] * len(row) for row in rows], 0)
        assert_same_logits(passed(base, model, ids, mask), torch.cat(wanted))
