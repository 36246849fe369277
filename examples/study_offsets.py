"""How much of the gates' affinities is the same for every token: a reason tested in docs/study.md.

    python examples/study_offsets.py POOL SUITE OUT.png OUT.json

Prompts of the suite pass through the base once. At each site an affinity of expert z and token t
is taken apart: its mean over tokens (z's offset, which no token can change) and the rest. Told is
the offsets' share of the variance over experts, by kind of site and block, and which expert the
mean over tokens and sites chooses for each dataset, with the pool's usual activation taken off
(centred) and without; and how far a few features stand out of an activation (kurtosis).
"""

from __future__ import annotations

import json
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from phatgoose.base.loading import Base, load_base
from phatgoose.base.sites import find_sites
from phatgoose.config import Routing
from phatgoose.experts.pool import Pool
from phatgoose.routing.routers.per_token.vector_router import VectorRouter
from phatgoose.routing.routers.router import RouterSite, router_of
from phatgoose.tasks.suites.entries import Sources
from phatgoose.tasks.suites.registry import open_suite

EXAMPLES = 15  # of each dataset


def routers_of(pool: Pool, affinity: str) -> dict[str, VectorRouter]:
    """PHATGOOSE's router at each site, with this affinity."""
    router, rows = router_of(Routing(affinity=affinity)), torch.arange(len(pool))
    return {
        site: router.at(RouterSite(site, rows, len(pool), router.state_at(pool, site), None))
        for site in pool.sites
    }


@contextmanager
def heard(base: Base, sites: list[str]) -> Iterator[dict[str, Tensor]]:
    """The activations [T, n] at each site of the pass inside, without the first token's."""
    seen: dict[str, Tensor] = {}

    def listen(site: str):  # noqa: ANN202
        return lambda _, args: seen.__setitem__(site, args[0][0, 1:].detach())

    handles = [base.model.get_submodule(s).register_forward_pre_hook(listen(s)) for s in sites]
    yield seen
    for handle in handles:
        handle.remove()


def main(pool_at: str, suite_at: str, figure: str, numbers: str) -> None:
    """Measure, draw, tell."""
    pool, base = Pool.open(pool_at), load_base("smollm2")
    plain, centred = routers_of(pool, "standardised"), routers_of(pool, "centred")
    affinities: dict[str, list[Tensor]] = defaultdict(list)
    activations: dict[str, list[float]] = defaultdict(list)
    choices: dict[str, dict[str, Counter[str]]] = {}
    for entry in open_suite(suite_at).entries:
        task = entry.read(Sources(None, None))
        chosen = {"standardised": Counter[str](), "centred": Counter[str]()}
        for example in task.evaluation_examples(EXAMPLES, 0):
            ids = base.tokenizer(
                example.input, truncation=True, max_length=256, return_tensors="pt"
            ).input_ids
            with torch.no_grad(), heard(base, list(pool.sites)) as seen:
                base.model(ids)
            for site, u in seen.items():
                activations[site].append(kurtosis(u))
            for label, routers in (("standardised", plain), ("centred", centred)):
                rows = {site: routers[site].affinities(u) for site, u in seen.items()}
                vote = torch.stack([row.mean(dim=0) for row in rows.values()]).mean(dim=0)
                chosen[label][pool.names[int(vote.argmax())]] += 1
                if label == "standardised":
                    for site, row in rows.items():
                        affinities[site].append(row)
        choices[task.name] = chosen
    sites = find_sites(base.model)
    shares: dict[str, list[float]] = defaultdict(list)
    peaks: dict[str, list[float]] = defaultdict(list)
    for site in sites:
        if site in affinities:
            kind, found = site.rsplit(".", 1)[1], activations[site]
            shares[kind].append(offset_share(torch.cat(affinities[site])))
            peaks[kind].append(round(sum(found) / len(found), 1))
    result = {"offset_share": shares, "kurtosis": peaks, "choices": choices, "examples": EXAMPLES}
    Path(numbers).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    draw(shares, figure)
    every = [share for row in shares.values() for share in row]
    print(f"mean share {sum(every) / len(every):.2f}; {json.dumps(choices)}")


def offset_share(rows: Tensor) -> float:
    """The offsets' share of the variance over experts of affinities [T, E]."""
    rows = rows - rows.mean(dim=1, keepdim=True)  # what all experts share decides nothing
    offsets = rows.mean(dim=0)
    return float(offsets.square().mean() / rows.square().mean())


def kurtosis(u: Tensor) -> float:
    """The mean over tokens of the features' kurtosis, u [T, n]; 3 for normal ones."""
    standardised = torch.nn.functional.layer_norm(u, u.shape[-1:])
    return float(standardised.pow(4).mean())


def draw(shares: dict[str, list[float]], out: str) -> None:
    """The shares as a heat map, kinds of site by blocks."""
    import matplotlib.pyplot as plt

    figure, panel = plt.subplots(figsize=(9, 2.8), layout="constrained")
    image = panel.imshow(list(shares.values()), vmin=0, vmax=1, aspect="auto", cmap="viridis")
    panel.set_yticks(range(len(shares)), list(shares))
    panel.set_xlabel("block")
    panel.set_title(
        "Share of the affinities' variance over experts that is the same for all tokens"
    )
    figure.colorbar(image, ax=panel)
    figure.savefig(out, dpi=130)


if __name__ == "__main__":
    main(*sys.argv[1:])
