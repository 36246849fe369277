"""Pools of ranks and sites that differ, and models compared in everything that decides."""

import copy
import warnings
from collections.abc import Iterable
from pathlib import Path

import torch
from transformers import PreTrainedModel

from phatgoose.base import Base
from phatgoose.experts.pool import Pool
from phatgoose.routing.compose import compose
from phatgoose.routing.composition import composition_of
from phatgoose.routing.recording import record
from phatgoose.routing.saved import add_to_saved, load, remove_from_saved, save, shareable
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


def changed(
    model: PreTrainedModel, folder: Path, base: Base, more: Pool | None = None, fewer: Iterable = ()
) -> PreTrainedModel:
    """`model`, saved to `folder`, there with the experts of `more` and without `fewer`, loaded."""
    save(model, folder)
    if more:
        add_to_saved(folder, more)
    if fewer:
        remove_from_saved(folder, fewer)
    return load(folder, copy.deepcopy(base))


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
        if hasattr(layer, "router"):
            assert layer.router.router == expected.router.router
            assert layer.router.k == expected.router.k
            ours, others = layer.router.state(), expected.router.state()
            assert all(torch.equal(ours[key], others[key]) for key in others)
    ids = make_ids(rows=2)
    with record(got) as one_told, record(wanted) as other_told:
        assert torch.equal(logits_of(got, ids), logits_of(wanted, ids))
    used, expected = one_told.usage(), other_told.usage()
    assert all(torch.equal(used[site], expected[site]) for site in expected)
