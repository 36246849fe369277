"""The routing of the paper's section 3 word by word, in float64, one token at a time: an oracle.

`formula` is the same for all tokens at once, with gradients, where whole models are compared.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from phatgoose.experts.expert import Expert

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


def formula(
    experts: Sequence[Expert],
    site: str,
    k: int,
    vectors: str = "gates",
    active: Tensor | None = None,
) -> Callable[[Tensor], Tensor]:
    """What `mixture` is at `site`, from tokens u [.., n] to float64 [.., d].

    Only experts that are `active` [.., E] at a token, by position in `experts`, are chosen there.
    """
    here = [z for z, expert in enumerate(experts) if site in expert.modules]
    acting = [expert for expert in experts if site in expert.modules]
    v = torch.stack([getattr(expert, vectors)[site].double() for expert in acting])
    v_bar = (v - v.mean(-1, keepdim=True)) / v.std(-1, unbiased=False, keepdim=True)
    scaled = [expert.lora[site].scale * expert.lora[site].B.double() for expert in acting]
    matrices = torch.stack(  # the experts' B A, [E, d, n]
        [B @ expert.lora[site].A.double() for B, expert in zip(scaled, acting, strict=True)]
    )

    def apply(u: Tensor) -> Tensor:
        exact = u.double()
        variance, mean = torch.var_mean(exact, -1, correction=0, keepdim=True)
        affinities = (exact - mean) / (variance + EPS).sqrt() @ v_bar.T
        if active is not None:
            affinities = affinities.masked_fill(~active[..., here], -math.inf)
        chosen = affinities.sort(dim=-1, descending=True, stable=True).indices[..., :k]
        powers = (affinities.gather(-1, chosen) / math.sqrt(u.shape[-1])).softmax(-1).nan_to_num(0)
        weights = torch.zeros_like(affinities).scatter(-1, chosen, powers)
        return torch.einsum("...z,zdn,...n->...d", weights, matrices, exact)

    return apply


@contextmanager
def naively_routed(
    model: PreTrainedModel,
    experts: Sequence[Expert],
    k: int,
    vectors: str = "gates",
    active: Tensor | None = None,
) -> Iterator[None]:
    """Add the naive mixture at every site of the plain `model` while the context is open."""

    def add_mixture(site: str):
        added = formula(experts, site, k, vectors, active)
        return lambda _, args, output: output + added(args[0]).to(output.dtype)

    sites = {site for expert in experts for site in expert.modules}
    handles = [model.get_submodule(site).register_forward_hook(add_mixture(site)) for site in sites]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def plain_scores(u: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
    """v̄ᵀū/√n with both standardised as the method's formula says, float64 [T, E]."""
    u, v = u.double(), gates.double()
    u = (u - u.mean(-1, keepdim=True)) / (u.var(-1, unbiased=False, keepdim=True) + EPS).sqrt()
    v = (v - v.mean(-1, keepdim=True)) / v.std(-1, unbiased=False, keepdim=True)
    return u @ v.T / math.sqrt(u.shape[-1])
