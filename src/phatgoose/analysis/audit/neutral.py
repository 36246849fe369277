"""Signs that neutral text shows: who wins where no expert's task is asked, and who changes what."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ...base.loading import Base
from ...base.offloading import execution_device
from ...base.sites import Site, find_sites
from ...config import Routing
from ...experts.kinds.kind import SiteModule
from ...experts.pool import Pool
from ...routing.routers.per_input.centroid import centroids_of
from ...routing.routers.per_input.embedding_reader import embeddings_of
from ...routing.routers.per_token.vector_router import ScoredRouter, standardise
from ...tasks.embeddings import DEFAULT_EMBEDDER, PROMPT, can_embed, embed_texts, prompt_texts
from ...tasks.encoding import Encoder
from ...tasks.neutral_text import neutral_examples
from ...tasks.prompt_passes import read_pairs
from .signs import over_sites, ratios

__all__ = ["NeutralText", "neutral_signs", "read_neutral_text"]

EVERY = 12  # of the tokens of neutral text one is kept at each site
TINY = 1e-30


@dataclass(frozen=True)
class NeutralText:
    """What a base makes of neutral text: the same for all pools of that base.

    `inputs` [tokens, n] of the sites by name, and the passages' embeddings `vectors` [passages,
    dims], None without an embedder here.
    """

    inputs: Mapping[str, Tensor]
    vectors: Tensor | None


@torch.no_grad()
def read_neutral_text(base: Base, names: Iterable[str], *, embed: bool = True) -> NeutralText:
    """What `base` makes of neutral text at the sites of these `names`.

    With `embed` it is embedded too, where the default embedder is on this machine.
    """
    every, kept = find_sites(base.model), dict[str, list[Tensor]]()

    def see(site: Site, u: Tensor) -> None:
        kept.setdefault(site.name, []).append(u[::EVERY].cpu())

    pairs = Encoder.for_model(base.model, base.tokenizer).pairs(neutral_examples())
    prompts = [pair.prompt for pair in pairs]
    sites = {name: every[name] for name in names}
    read_pairs(base.model, sites, pairs, base.tokenizer.pad_token_id, see)
    texts = prompt_texts(base.tokenizer, prompts)
    vectors = embed_texts(texts) if embed and can_embed() else None
    return NeutralText({name: torch.cat(parts) for name, parts in kept.items()}, vectors)


def neutral_signs(pool: Pool, base: Base, text: NeutralText) -> dict[str, Tensor]:
    """The signs of the experts of `pool` over neutral text, by name, float64 [E] each.

    `update_effect` is how much larger than the pool's median the change of a layer's output is
    under an expert's module, `effect_spread` what the site that stands out most is above that.
    `gate_neutral`, `retrieval_neutral` and `centroid_neutral` are the shares that routers phatgoose
    (of tokens and sites), retrieval and centroid (of passages) would give to each expert.
    """
    found = {**_effects(pool, base, text), "gate_neutral": _by_gates(pool, text)}
    made = {(expert.info.embedder, expert.info.embedding_form) for expert in pool.experts}
    comparable = made == {(DEFAULT_EMBEDDER, PROMPT)}
    if text.vectors is not None and comparable and _share(pool, "embeddings"):
        found |= _by_embeddings(pool, text.vectors)
    pool.release()
    return found


def _share(pool: Pool, part: str) -> bool:
    """True where every expert has the `part`, and there are several."""
    return len(pool) > 1 and all(expert.has(part) for expert in pool.experts)


@torch.no_grad()
def _effects(pool: Pool, base: Base, text: NeutralText) -> dict[str, Tensor]:
    rows = []
    for name, u in text.inputs.items():
        row = torch.full((len(pool),), math.nan, dtype=torch.float64)
        for z, expert in enumerate(pool.experts):
            if len(u) and name in expert.modules:
                row[z] = _change(base.model.get_submodule(name), u, expert.modules[name])
        rows.append(ratios(row))
    size, spread = over_sites(torch.stack(rows, dim=1))
    return {"update_effect": size, "effect_spread": spread}


def _change(layer: torch.nn.Module, u: Tensor, module: SiteModule) -> float:
    """The norm of what `module` adds to the output of `layer` for u [T, n], over the output's."""
    u = u.to(execution_device(layer))
    plain = layer(u)
    changed = module.at(torch.empty(0, dtype=u.dtype, device=u.device)).apply(layer, u)
    difference = (changed.double() - plain.double()).norm()
    return float(difference / plain.double().norm().clamp(min=TINY))


def _by_gates(pool: Pool, text: NeutralText) -> Tensor:
    """The share of tokens and sites at which each expert's gate fits best, where it has one."""
    first, seen = (torch.zeros(len(pool), dtype=torch.float64) for _ in range(2))
    for name, u in text.inputs.items():
        gated = [z for z, expert in enumerate(pool.experts) if name in expert.gates]
        if len(gated) < 2:
            continue
        gates = standardise(torch.stack([pool.experts[z].gates[name] for z in gated]))
        best = ScoredRouter(gates, 1, Routing().eps).affinities(u).argmax(dim=1)
        first[gated] += torch.bincount(best, minlength=len(gated)).double()
        seen[gated] += len(u)
    return first / seen.masked_fill(seen == 0, math.nan)


def _by_embeddings(pool: Pool, queries: Tensor) -> dict[str, Tensor]:
    """The shares of passages that routers retrieval and centroid give to each expert."""
    stored = embeddings_of(pool)
    best = torch.full((len(queries), len(pool)), -math.inf)
    cosines = queries @ stored.rows.T
    best = best.scatter_reduce(1, stored.owners.expand_as(cosines), cosines, "amax")
    nearest = queries @ centroids_of(pool).rows.T
    return {"retrieval_neutral": _shares(best), "centroid_neutral": _shares(nearest)}


def _shares(scores: Tensor) -> Tensor:
    """The share of rows of `scores` [rows, E] that each expert wins, float64 [E]."""
    return functional.one_hot(scores.argmax(dim=1), scores.shape[1]).double().mean(dim=0)
