"""The routing of the paper's section 3 in float64."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from phatgoose.experts.expert import Expert

EPS = 1e-5


def plain_scores(u: Tensor, vectors: Tensor) -> Tensor:
    """v̄ᵀū/√n of tokens u [.., n] and `vectors` [E, n], float64 [.., E]."""
    u, v = u.double(), vectors.double()
    u = (u - u.mean(-1, keepdim=True)) / (u.var(-1, unbiased=False, keepdim=True) + EPS).sqrt()
    v = (v - v.mean(-1, keepdim=True)) / v.std(-1, unbiased=False, keepdim=True)
    return u @ v.T / math.sqrt(u.shape[-1])


def token_weights(u: Tensor, experts: Sequence[Expert], site: str, k: int) -> dict[int, float]:
    """The weights of the chosen experts for one token u [n], by position in `experts`."""
    here = [z for z, expert in enumerate(experts) if site in expert.modules]
    scores = plain_scores(u, torch.stack([experts[z].gates[site] for z in here]))
    best = scores.topk(min(k, len(here)))
    return {here[i]: w for i, w in zip(best.indices, best.values.softmax(-1).tolist(), strict=True)}


def formula(
    experts: Sequence[Expert],
    site: str,
    k: int,
    vectors: str = "gates",
    active: Tensor | None = None,
) -> Callable[[Tensor], Tensor]:
    """What the experts add at `site`, from tokens u [.., n] to float64 [.., d], with gradients.

    Only experts that are `active` [.., E] at a token, by position in `experts`, are chosen there.
    """
    here = [z for z, expert in enumerate(experts) if site in expert.modules]
    v = torch.stack([getattr(experts[z], vectors)[site] for z in here])
    loras = [experts[z].lora[site] for z in here]
    matrices = torch.stack([lora.scale * lora.B.double() @ lora.A.double() for lora in loras])

    def apply(u: Tensor) -> Tensor:
        scores = plain_scores(u, v)
        if active is not None:
            scores = scores.masked_fill(~active[..., here], -math.inf)
        chosen = scores.sort(dim=-1, descending=True, stable=True).indices[..., :k]
        powers = scores.gather(-1, chosen).softmax(-1).nan_to_num(0)
        weights = torch.zeros_like(scores).scatter(-1, chosen, powers)
        return torch.einsum("...z,zdn,...n->...d", weights, matrices, u.double())

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
