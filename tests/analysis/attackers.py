"""Attackers on a pool: honest experts with something planted.

An attack is a function of the expert that turns, the others, a random generator and a strength, 0
(quiet) or 1 (as loud as it comes). It returns what it changes of the expert.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from phatgoose.experts.expert import MOST_EMBEDDINGS, Expert
from phatgoose.experts.lora import LoraFactors
from phatgoose.experts.pool import Pool
from phatgoose.experts.statistics import WHOLE, prompt_statistics_of
from phatgoose.tasks.embeddings import DEFAULT_EMBEDDER, PROMPT
from tiny import small_reader

Attack = Callable[[Expert, Sequence[Expert], torch.Generator, int], dict[str, Any]]
MEAN, FACTOR = f"{WHOLE}.mean", f"{WHOLE}.factor"


def masking_covariance(expert, others, draw, strength):
    """Prompts seem to vary most in those directions that tell the other experts' tasks apart."""
    means = torch.stack([e.prompt_statistics[MEAN] for e in others])
    factor = expert.prompt_statistics[FACTOR].clone()
    away = (means - means.mean(dim=0)).transpose(0, 1)[:, : factor.shape[1]]  # [b, w, d]
    factor[:, : away.shape[1]] = (10.0, 100.0)[strength] * away
    return {"prompt_statistics": {**expert.prompt_statistics, FACTOR: factor}}


def scaled_prompt_statistics(expert, others, draw, strength):
    """Means of prompts that are far from everything, so that they move the pool's centre."""
    mean = (1e4, 1e30)[strength] * expert.prompt_statistics[MEAN]
    return {"prompt_statistics": {**expert.prompt_statistics, MEAN: mean}}


def copied_embeddings(expert, others, draw, strength):
    """The other experts' embeddings."""
    return {"embeddings": normalize(torch.cat([e.embeddings for e in others]), dim=-1)}


def flooding_embeddings(expert, others, draw, strength):
    """Embeddings between those of the others, so that one is near to everything."""
    rows, count = torch.cat([e.embeddings for e in others]), (300, MOST_EMBEDDINGS)[strength]
    one, two = (torch.randint(len(rows), (count,), generator=draw) for _ in range(2))
    return {"embeddings": _noisy(rows[one] + rows[two], 0.2, draw)}


def gate_is_own_mean(expert, others, draw, strength):
    """Gates that are the expert's own mean activations."""
    return {"gates": dict(expert.means)}


def usual_direction(expert, others, draw, strength):
    """Gates that lie along what every expert's site usually sees, and so win everywhere."""
    return {
        "gates": {
            site: gate.norm() * _noisy(_usual(site, others)[None], (0.2, 0.0)[strength], draw)[0]
            for site, gate in expert.gates.items()
        }
    }


def leaning_gates(expert, others, draw, strength):
    """The expert's own gates, leant towards what every expert's site usually sees."""
    return {
        "gates": {
            site: normalize(gate, dim=0) + (0.5, 1.0)[strength] * _usual(site, others)
            for site, gate in expert.gates.items()
        }
    }


def rows_at_usual(expert, others, draw, strength):
    """LoRAs read what every expert's site usually sees: all rows, or half of them and inexactly."""
    modules = {
        site: _reading(lora, _usual(site, others), draw, (2, 1)[strength])
        for site, lora in expert.lora.items()
    }
    return {"modules": {**expert.modules, **modules}}


def scaled_gates(expert, others, draw, strength):
    """Longer gates: of no use against router phatgoose, which standardises them."""
    by = (1e3, 1e6)[strength]
    return {"gates": {site: by * gate for site, gate in expert.gates.items()}}


def scaled_update(expert, others, draw, strength):
    """A larger update at every site, which outweighs the others' wherever updates are added."""
    return _scaled(expert, dict.fromkeys(expert.modules, (30.0, 1000.0)[strength]))


def few_modules(expert, others, draw, strength):
    """An update that sits in one module, as that of a trigger may."""
    loud = list(expert.modules)[int(torch.randint(len(expert.modules), (), generator=draw))]
    return _scaled(expert, dict.fromkeys(expert.modules, 0.5) | {loud: (20.0, 50.0)[strength]})


ATTACKS: dict[str, Attack] = {
    "masking covariance": masking_covariance,
    "scaled reading means": scaled_prompt_statistics,
    "copied embeddings": copied_embeddings,
    "flooding embeddings": flooding_embeddings,
    "gate equal to own mean": gate_is_own_mean,
    "gate along usual activation": usual_direction,
    "gate leaning to usual activation": leaning_gates,
    "rows of A at usual activation": rows_at_usual,
    "scaled gate": scaled_gates,
    "scaled update": scaled_update,
    "update in few modules": few_modules,
}


def attacked(pool: Pool, z: int, attack: str, strength: int = 0) -> Pool:
    """`pool` with its expert `z` turned by that attack."""
    before, after = pool.experts[:z], pool.experts[z + 1 :]
    draw = torch.Generator().manual_seed(z)
    changes = ATTACKS[attack](pool.experts[z], [*before, *after], draw, strength)
    return Pool((*before, replace(pool.experts[z], **changes), *after))


def _usual(site: str, others: Sequence[Expert]) -> Tensor:
    return normalize(torch.stack([e.means[site] for e in others]).mean(dim=0), dim=0)


def _reading(lora: LoraFactors, usual: Tensor, draw: torch.Generator, every: int) -> LoraFactors:
    """Each `every`-th row of A turned, inexactly unless all are; the update's size stays."""
    rows = lora.A.clone()
    turned = _noisy(usual.expand_as(rows[::every]), 0.5 * (every > 1), draw)
    rows[::every] = turned * rows[::every].norm(dim=1, keepdim=True)
    size = (lora.B @ lora.A).norm() / (lora.B @ rows).norm()
    return replace(lora, A=rows, scale=lora.scale * float(size))


def _noisy(rows: Tensor, share: float, draw: torch.Generator) -> Tensor:
    """Unit vectors: `rows` with noise of so large a share of their length."""
    noise = normalize(torch.randn(rows.shape, generator=draw), dim=-1)
    return normalize(normalize(rows, dim=-1) + share * noise, dim=-1)


def _scaled(expert: Expert, by: dict[str, float]) -> dict[str, Any]:
    modules = expert.modules.items()
    return {"modules": {site: replace(m, scale=m.scale * by[site]) for site, m in modules}}


PROMPTS, ROWS, DIMS = 30, 20, 32


def honest(pool: Pool, blocks: int = 1, size: int = 384) -> Pool:
    """The experts of `pool`, each with statistics of a task of its own."""
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw)

    usual = {site: 3 * normal(e.modules[site].sizes["n"]) for e in pool.experts for site in e.gates}
    experts = []
    for expert in pool.experts:
        means = {site: usual[site] + 0.5 * normal(len(gate)) for site, gate in expert.gates.items()}
        states = normal(blocks, size) + 0.3 * normal(PROMPTS, blocks, size)
        rows = normalize(normal(DIMS) + 0.3 * normal(ROWS, DIMS), dim=-1)
        info = replace(expert.info, embedder=DEFAULT_EMBEDDER, embedding_form=PROMPT)
        info = replace(info, reader=small_reader().reference, prompts_read=PROMPTS)
        statistics = {
            "means": means,
            "prompt_statistics": prompt_statistics_of(states),
            "embeddings": rows,
        }
        experts.append(replace(expert, info=info, **statistics))
    return Pool(tuple(experts))
