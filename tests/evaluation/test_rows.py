"""The rows of a comparison: their labels, what each composes, what tells their results apart."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from phatgoose.config import Routing
from phatgoose.evaluation.compare import (
    DERIVED,
    METHODS,
    Row,
    rows_of,
    single_rows,
)
from phatgoose.experts.pool import Pool
from phatgoose.routing.routers.registry import OURS
from routed_models import with_embeddings
from tiny import logits_of, make_ids


def test_there_is_a_method_for_every_router_and_the_base():
    assert set(METHODS) == {"base", *OURS} - {"single", "weights"}
    assert list(METHODS)[-2:] == list(DERIVED)


ROUTING = Routing(router="phatgoose")
COMPOSED = ["random", "retrieval", "centroid", "average-activation", "arrow", "spectr", "merged"]
COMPOSED += ["phatgoose"]
TOP_K = {"random", "average-activation", "arrow", "spectr", "phatgoose"}
GATED = {"phatgoose"}
EMBEDDED = {"retrieval", "centroid"}
WITHOUT_EXAMPLES = [name for name in METHODS if name != "few-shot"]
KNOWN = {"base", *COMPOSED, "e0", "e1", "e2"}  # to the tables below


@pytest.fixture
def three(pool_of: Callable[..., Pool]) -> Pool:
    """Three experts of the tiny Llama with all that any router needs."""
    return with_embeddings(pool_of("llama", (4, 4, 4)))


def row_of(name: str, pool: Pool, **settings: object) -> Row:
    (row,) = rows_of(pool, [name], replace(ROUTING, **settings))
    return row


def changed(pool: Pool, index: int, **parts: object) -> Pool:
    """The pool with another `parts` in one expert, whose adapter stays."""
    experts = list(pool.experts)
    experts[index] = replace(experts[index], **parts)
    return Pool(tuple(experts))


def test_the_base_is_the_same_bit_by_bit_after_an_error(three, llama):
    before = logits_of(llama.model, make_ids())
    for row in rows_of(three, ["phatgoose", "merged"], ROUTING):
        with pytest.raises(KeyboardInterrupt), row.model(llama):
            raise KeyboardInterrupt
        assert torch.equal(logits_of(llama.model, make_ids()), before)


# What tells results apart


@pytest.mark.parametrize(
    ("settings", "matter_to"),
    [
        ({"k": 1}, {*TOP_K, "centroid"}),
        ({"k": 2}, {"retrieval", "centroid"}),
        ({"kernel": "reference"}, set(COMPOSED)),
        ({"router": "merged"}, set()),
        ({"embedder": "them/theirs"}, set()),
    ],
    ids=["k=1", "k=2", "kernel", "router", "embedder"],
)
def test_a_setting_matters_to_the_rows_that_use_it(three, settings, matter_to):
    differ = {
        name
        for name in ("base", *COMPOSED)
        if row_of(name, three).identity != row_of(name, three, **settings).identity
    }
    assert differ == matter_to


@pytest.mark.parametrize(
    ("part", "matter_to"),
    [
        ("gates", GATED),
        ("means", {"average-activation"}),
        ("embeddings", EMBEDDED),
        ("embedder", EMBEDDED),
        ("scale", {*COMPOSED, "e1"}),
        ("name", {"e1"}),  # that row is gone; all others stand
        ("order", set(COMPOSED)),
    ],
)
def test_a_part_of_an_expert_matters_to_the_rows_that_use_it(three, part, matter_to):
    expert = three.experts[1]
    if part in ("gates", "means"):
        vectors = dict(getattr(expert, part))
        site = sorted(vectors)[3]
        other = changed(three, 1, **{part: {**vectors, site: vectors[site] + 1e-6}})
    elif part == "embeddings":
        other = changed(three, 1, embeddings=expert.embeddings.flip(0).roll(1, -1))
    elif part in ("embedder", "name"):
        other = changed(three, 1, info=replace(expert.info, **{part: "other"}))
    elif part == "scale":  # adapter_config.json's lora_alpha: the weights' file stays the same
        modules = {s: replace(each, scale=3 * each.scale) for s, each in expert.lora.items()}
        other = changed(three, 1, modules=modules)
    else:
        other = Pool(three.experts[::-1])
    rows, others = (
        {
            row.name: row.identity
            for row in (*rows_of(p, WITHOUT_EXAMPLES, ROUTING), *single_rows(p))
        }
        for p in (three, other)
    )
    assert {name for name in KNOWN if others.get(name) != rows[name]} == matter_to
