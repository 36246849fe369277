"""The rows of a comparison: their labels, what each composes, what tells their results apart."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from phatgoose.config import Routing
from phatgoose.evaluation.compare import DERIVED, METHODS, Row, rows_of, single_rows
from phatgoose.experts.pool import Pool
from phatgoose.routing.routers.registry import OURS
from routed_models import with_embeddings
from tiny import logits_of, make_ids


def test_there_is_a_method_for_every_router_and_the_base():
    assert set(METHODS) == {"base", *OURS} - {"single", "weights"}
    assert list(METHODS)[-2:] == list(DERIVED)


ROUTING = Routing(router="phatgoose")
TOP_K = {"random", "average-activation", "arrow", "spectr", "phatgoose"}
EMBEDDED = {"retrieval", "centroid"}
COMPOSED = [*TOP_K, *EMBEDDED, "merged"]
WITHOUT_EXAMPLES = [name for name in METHODS if name != "few-shot"]
KNOWN = {"base", *COMPOSED, "e0", "e1", "e2"}  # to the tables below


@pytest.fixture
def three(pool_of: Callable[..., Pool]) -> Pool:
    """Three experts of the tiny Llama with all that any router needs."""
    return with_embeddings(pool_of("llama", (4, 4, 4)))


def row_of(name: str, pool: Pool, **settings: object) -> Row:
    (row,) = rows_of(pool, [name], replace(ROUTING, **settings))
    return row


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
    ],
    ids=["k=1", "k=2", "kernel", "router"],
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
        ("gates", {"phatgoose"}),
        ("means", {"average-activation"}),
        ("embeddings", EMBEDDED),
        ("embedder", EMBEDDED),
        ("scale", {*COMPOSED, "e1"}),
        ("name", {"e1"}),  # that row is gone; all others stand
        ("order", set(COMPOSED)),
    ],
)
def test_a_part_of_an_expert_matters_to_the_rows_that_use_it(three, part, matter_to):
    first, expert, last = three.experts
    if part in ("gates", "means"):
        vectors = dict(getattr(expert, part))
        site = sorted(vectors)[3]
        changes = {part: {**vectors, site: vectors[site] + 1e-6}}
    elif part == "embeddings":
        changes = {part: expert.embeddings.flip(0).roll(1, -1)}
    elif part in ("embedder", "name"):
        changes = {"info": replace(expert.info, **{part: "other"})}
    elif part == "scale":  # adapter_config.json's lora_alpha: the weights' file stays the same
        loras = expert.lora.items()
        changes = {"modules": {site: replace(x, scale=3 * x.scale) for site, x in loras}}
    else:
        first, last, changes = last, first, {}
    other = Pool((first, replace(expert, **changes), last))
    rows, others = (
        {
            row.name: row.identity
            for row in (*rows_of(p, WITHOUT_EXAMPLES, ROUTING), *single_rows(p))
        }
        for p in (three, other)
    )
    assert {name for name in KNOWN if others.get(name) != rows[name]} == matter_to
