"""Attackers on a pool: honest experts with something planted.

An attack is a function of the pool, the index of the expert that turns, a random generator and a
strength, 0 (quiet) or 1 (as loud as it comes). It returns the expert that takes the honest one's
place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from phatgoose.experts.expert import MOST_EMBEDDINGS, Expert
from phatgoose.experts.lora import LoraFactors
from phatgoose.experts.pool import Pool
from phatgoose.experts.statistics import READ, readings_of
from phatgoose.tasks.embeddings import DEFAULT_EMBEDDER, PROMPT

Attack = Callable[[Pool, int, torch.Generator, int], Expert]


def masking_covariance(pool: Pool, z: int, draw: torch.Generator, strength: int) -> Expert:
    """Prompts seem to vary most in those directions that tell the other experts' tasks apart."""
    readings = dict(pool.experts[z].readings)
    means = torch.stack([expert.readings[f"{READ}.mean"] for expert in pool.experts])
    factor = readings[f"{READ}.factor"].clone()
    others = torch.cat([means[:z], means[z + 1 :]])
    away = (others - others.mean(dim=0)).transpose(0, 1)[:, : factor.shape[1]]  # [b, w, d]
    factor[:, : away.shape[1]] = (10.0, 100.0)[strength] * away
    readings[f"{READ}.factor"] = factor
    return replace(pool.experts[z], readings=readings)


def scaled_readings(pool: Pool, z: int, draw: torch.Generator, strength: int) -> Expert:
    """Means of readings that are far from everything, so that they move the pool's centre."""
    by = (1e4, 1e30)[strength]
    readings = {
        name: by * part if name.endswith(".mean") else part
        for name, part in pool.experts[z].readings.items()
    }
    return replace(pool.experts[z], readings=readings)


def copied_embeddings(pool: Pool, z: int, draw: torch.Generator, strength: int) -> Expert:
    """The other experts' embeddings."""
    rows = _of_others(pool, z)
    rows = rows[torch.randperm(len(rows), generator=draw)[:MOST_EMBEDDINGS]]
    return replace(pool.experts[z], embeddings=functional.normalize(rows, dim=-1))


def flooding_embeddings(pool: Pool, z: int, draw: torch.Generator, strength: int) -> Expert:
    """Embeddings between those of the others, so that one is near to everything."""
    rows = _of_others(pool, z)
    count = (300, MOST_EMBEDDINGS)[strength]
    one, two = (torch.randint(len(rows), (count,), generator=draw) for _ in range(2))
    return replace(pool.experts[z], embeddings=_noisy(rows[one] + rows[two], 0.2, draw))


def gate_is_own_mean(pool: Pool, z: int, draw: torch.Generator, strength: int) -> Expert:
    """Gates that are the expert's own mean activations."""
    return replace(pool.experts[z], gates=dict(pool.experts[z].means))


def usual_direction(pool: Pool, z: int, draw: torch.Generator, strength: int) -> Expert:
    """Gates that lie along what every expert's site usually sees, and so win everywhere."""
    expert = pool.experts[z]
    gates = {}
    for site, own in expert.gates.items():
        usual = pool.vectors("means", site).mean(dim=0)
        gates[site] = own.norm() * _noisy(usual[None], (0.2, 0.0)[strength], draw)[0]
    return replace(expert, gates=gates)


def leaning_gates(pool: Pool, z: int, draw: torch.Generator, strength: int) -> Expert:
    """The expert's own gates, leant towards what every expert's site usually sees."""
    expert, share = pool.experts[z], (0.5, 1.0)[strength]
    gates = {}
    for site, own in expert.gates.items():
        usual = functional.normalize(pool.vectors("means", site).mean(dim=0), dim=0)
        gates[site] = functional.normalize(own, dim=0) + share * usual
    return replace(expert, gates=gates)


def scaled_gates(pool: Pool, z: int, draw: torch.Generator, strength: int) -> Expert:
    """Longer gates: of no use against router phatgoose, which standardises them."""
    by = (1e3, 1e6)[strength]
    expert = pool.experts[z]
    return replace(expert, gates={site: by * gate for site, gate in expert.gates.items()})


def scaled_update(pool: Pool, z: int, draw: torch.Generator, strength: int) -> Expert:
    """A larger update at every site, which outweighs the others' wherever updates are added."""
    by = (30.0, 1000.0)[strength]
    expert = pool.experts[z]
    modules = {site: _scaled(module, by) for site, module in expert.modules.items()}
    return replace(expert, modules=modules)


def few_modules(pool: Pool, z: int, draw: torch.Generator, strength: int) -> Expert:
    """An update that sits in a few modules, as that of a trigger may."""
    by = (20.0, 50.0)[strength]
    expert = pool.experts[z]
    names = list(expert.modules)
    count = max(1, len(names) // 14)
    loud = {names[i] for i in torch.randperm(len(names), generator=draw)[:count].tolist()}
    modules = {s: _scaled(m, by if s in loud else 0.5) for s, m in expert.modules.items()}
    return replace(expert, modules=modules)


ATTACKS: dict[str, Attack] = {
    "masking covariance": masking_covariance,
    "scaled reading means": scaled_readings,
    "copied embeddings": copied_embeddings,
    "flooding embeddings": flooding_embeddings,
    "gate equal to own mean": gate_is_own_mean,
    "gate along usual activation": usual_direction,
    "gate leaning to usual activation": leaning_gates,
    "scaled update": scaled_update,
    "update in few modules": few_modules,
}
HARMLESS: dict[str, Attack] = {"scaled gate": scaled_gates}


def attacked(pool: Pool, z: int, attack: Attack, seed: int, strength: int) -> Pool:
    """`pool` with its expert `z` turned by `attack`."""
    turned = attack(pool, z, torch.Generator().manual_seed(seed), strength)
    return Pool((*pool.experts[:z], turned, *pool.experts[z + 1 :]))


def _of_others(pool: Pool, z: int) -> Tensor:
    return torch.cat([_of(expert) for i, expert in enumerate(pool.experts) if i != z])


def _of(expert: Expert) -> Tensor:
    return torch.empty(0) if expert.embeddings is None else expert.embeddings


def _noisy(rows: Tensor, share: float, draw: torch.Generator) -> Tensor:
    """Unit vectors: `rows` with noise of so large a share of their length."""
    unit = functional.normalize(rows, dim=-1)
    noise = functional.normalize(torch.randn(rows.shape, generator=draw), dim=-1)
    return functional.normalize(unit + share * noise, dim=-1)


def _scaled(module: LoraFactors, by: float) -> LoraFactors:
    return replace(module, scale=module.scale * by)


PROMPTS, ROWS, DIMS = 30, 20, 32


def honest(pool: Pool, blocks: int = 2, size: int = 32) -> Pool:
    """The experts of `pool`, each with statistics of a task of its own."""
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw)

    usual = {
        site: 3 * normal(e.modules[site].in_features) for e in pool.experts for site in e.gates
    }
    experts = []
    for expert in pool.experts:
        means = {site: usual[site] + 0.5 * normal(len(gate)) for site, gate in expert.gates.items()}
        states = normal(2, blocks, size) + 0.3 * normal(PROMPTS, 2, blocks, size)
        rows = functional.normalize(normal(DIMS) + 0.3 * normal(ROWS, DIMS), dim=-1)
        experts.append(
            replace(
                expert,
                info=replace(expert.info, embedder=DEFAULT_EMBEDDER, embedding_form=PROMPT),
                means=means,
                readings=readings_of(states[:, 1]),
                embeddings=rows,
            )
        )
    return Pool(tuple(experts))
