"""Several experts at once by hand: hooks that add their weighted updates to the base's outputs."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from oracle import update
from phatgoose.base.loading import Base
from phatgoose.experts.pool import Pool
from tiny import logits_of


@contextmanager
def adding(base: Base, pool: Pool, weights: Mapping[str, float]) -> Iterator[None]:
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


def logits_by_hand(base: Base, pool: Pool, ids: Tensor, weights: Mapping[str, float]) -> Tensor:
    """The logits of `ids` [1, tokens] with these weights."""
    with adding(base, pool, weights):
        return logits_of(base.model, ids)
