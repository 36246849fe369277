"""METHOD section 4 written out word by word, in float64 and one token at a time, for comparison."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from phatgoose.expert import Expert

EPS = 1e-5


def token_weights(
    u: Tensor, experts: Sequence[Expert], site: str, k: int, vectors: str = "gates"
) -> dict[int, float]:
    """The weights of the chosen experts for one token u [n], by position in `experts`."""
    n = len(u)
    u = u.double()
    u_bar = (u - u.mean()) / math.sqrt(u.var(unbiased=False) + EPS)
    affinities = {}
    for z, expert in enumerate(experts):
        if site in expert.modules:
            v = getattr(expert, vectors)[site].double()
            v_bar = (v - v.mean()) / v.std(unbiased=False)
            affinities[z] = float(v_bar @ u_bar)
    chosen = sorted(affinities, key=lambda z: -affinities[z])[:k]
    powers = {z: math.exp(affinities[z] / math.sqrt(n)) for z in chosen}
    return {z: power / sum(powers.values()) for z, power in powers.items()}


def update(expert: Expert, site: str, u: Tensor) -> Tensor:
    """One expert's update `scale * B A u` of one token u [n], float64."""
    lora = expert.lora[site]
    return lora.scale * lora.B.double() @ (lora.A.double() @ u.double())


def mixture(
    u: Tensor, experts: Sequence[Expert], site: str, k: int, vectors: str = "gates"
) -> Tensor:
    """The weighted sum of the chosen experts' updates for tokens u [.., n], float64 [.., d]."""
    rows = []
    for token in u.reshape(-1, u.shape[-1]):
        weights = token_weights(token, experts, site, k, vectors)
        rows.append(sum(w * update(experts[z], site, token) for z, w in weights.items()))
    return torch.stack(rows).view(*u.shape[:-1], -1)


@contextmanager
def naively_routed(
    model: PreTrainedModel, experts: Sequence[Expert], k: int, vectors: str = "gates"
) -> Iterator[None]:
    """Add the naive mixture at every site of the plain `model` while the context is open."""

    def add_mixture(site: str):
        def hook(_, args, output):
            return output + mixture(args[0], experts, site, k, vectors).to(output.dtype)

        return hook

    sites = {site for expert in experts for site in expert.modules}
    handles = [model.get_submodule(site).register_forward_hook(add_mixture(site)) for site in sites]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
