"""Pools of ranks and sites that differ, and models compared in everything that decides."""

import copy
import json
import warnings
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file

from phatgoose.base.loading import Base
from phatgoose.base.sites import find_sites
from phatgoose.experts.expert import LAYOUT, ExpertInfo
from phatgoose.experts.kinds.peft import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from phatgoose.experts.pool import Pool
from phatgoose.files.strict import sha256_of
from phatgoose.routing.compose import compose
from phatgoose.routing.composition import composition_of
from phatgoose.routing.recording import record
from phatgoose.routing.routers.phatgoose import TopKRouter
from phatgoose.routing.saved.tensors import shareable
from routed_models import with_embeddings
from tiny import logits_of, make_ids, write_expert

ROUTERS = (
    "phatgoose",
    "average-activation",
    "arrow",
    "spectr",
    "retrieval",
    "centroid",
    "discriminant",
    "merged",
    "random",
)
EMBEDDED = ("retrieval", "centroid")
NAMES = ("e0", "e1", "e2", "e3")


def uneven_pool(base: Base, folder: Path) -> Pool:
    """e0 to e3 of ranks 2, 1, 3, 1; e1 acts on queries only, e3 at no query."""
    others = ["k_proj", "v_proj", "down_proj"]
    return Pool(
        (
            write_expert(base, folder, "e0", seed=0, rank=2, target_modules=[*others, "q_proj"]),
            write_expert(base, folder, "e1", seed=1, rank=1, target_modules=["q_proj"]),
            write_expert(base, folder, "e2", seed=2, rank=3),
            write_expert(base, folder, "e3", seed=3, rank=1, target_modules=others),
        )
    )


def composed(router: str, pool: Pool, base: Base, **options: object):
    given = {"router": router, **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a k that is lowered
        pool = with_embeddings(pool) if router in EMBEDDED else pool
        return compose(pool, copy.deepcopy(base), **given)


def assert_same_models(got, wanted) -> None:
    """Everything that decides is equal, and so are the numbers."""
    one, other = composition_of(got), composition_of(wanted)
    assert one.experts == other.experts
    assert shareable(one.records) == shareable(other.records)
    assert one.routing == other.routing
    assert set(one.layers) == set(other.layers)
    for name, layer in one.layers.items():
        expected = other.layers[name]
        assert got.get_submodule(name) is layer
        assert torch.equal(layer.experts, expected.experts)
        assert type(layer) is type(expected)
        mine, theirs = layer.stack.tensors(), expected.stack.tensors()
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)
        assert type(layer.router) is type(expected.router)
        if isinstance(layer.router, TopKRouter):
            assert torch.equal(layer.router.vectors, expected.router.vectors)
            assert layer.router.k == expected.router.k
    ids = make_ids(rows=2)
    with record(got) as one_told, record(wanted) as other_told:
        assert torch.equal(logits_of(got, ids), logits_of(wanted, ids))
    used, expected = one_told.usage(), other_told.usage()
    assert all(torch.equal(used[site], expected[site]) for site in expected)


def write_small_experts(base: Base, folder: Path, count: int, rank: int) -> list[Path]:
    """The folders of experts x0000, x0001, … of random numbers, with gates, at all sites."""
    sites = find_sites(base.model).values()
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": "all-linear"}
    generator, places = torch.Generator().manual_seed(0), []
    for z in range(count):
        place = folder / f"x{z:04}"
        place.mkdir(parents=True)
        weights, gates = {}, {}
        for site in sites:
            gates[f"gate.{site.name}"] = torch.randn(site.in_features, generator=generator)
            prefix = f"base_model.model.{site.name}.lora_"
            shapes = {"A": (rank, site.in_features), "B": (site.out_features, rank)}
            for side, shape in shapes.items():
                weights[f"{prefix}{side}.weight"] = torch.randn(shape, generator=generator)
        (place / ADAPTER_CONFIG).write_text(json.dumps(config))
        save_file(weights, place / ADAPTER_WEIGHTS)
        save_file(gates, place / LAYOUT.vectors)
        hashes = (sha256_of(place / file) for file in (ADAPTER_WEIGHTS, LAYOUT.vectors))
        info = ExpertInfo(place.name, base.reference, *hashes)
        (place / LAYOUT.info).write_text(json.dumps(asdict(info)))
        places.append(place)
    return places
