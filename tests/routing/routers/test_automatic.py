"""Router auto: the first that a base and its experts allow, by name in what comes out."""

from __future__ import annotations

import json
import logging
from dataclasses import replace

import pytest

from phatgoose.analysis.analyse import analyse
from phatgoose.config import Routing
from phatgoose.experts.pool import Pool
from phatgoose.routing.compose import compose, detach
from phatgoose.routing.composition import composition_of
from phatgoose.routing.routers.automatic import DECODER_ONLY, ENCODER_DECODER, settled
from phatgoose.routing.routers.registry import ROUTERS
from phatgoose.routing.saved.save import save
from phatgoose.tasks.task import Example, Task

BARE = {"gates": {}, "means": {}, "readings": {}, "embeddings": None}


def stripped(pool: Pool, *parts: str) -> Pool:
    """The pool, whose last expert lacks these `parts`."""
    bare = {part: BARE[part] for part in parts}
    return Pool((*pool.experts[:-1], replace(pool.experts[-1], **bare)))


@pytest.mark.parametrize(
    ("lacks", "wanted"),
    [
        ((), "discriminant"),
        (("readings",), "phatgoose"),
        (("readings", "gates"), "average-activation"),
        (("readings", "gates", "means"), "logo"),
    ],
)
def test_a_decoder_gets_the_first_that_every_expert_allows(llama, llama_pool, lacks, wanted):
    found = settled(Routing(router="auto", k=3), stripped(llama_pool, *lacks), llama.model)
    assert found == Routing(router=wanted, k=3)


@pytest.mark.parametrize("kind", ["t5"], indirect=True)
def test_an_encoder_decoder_gets_the_papers(base, pool):
    assert settled(Routing(router="auto"), pool, base.model).router == "phatgoose"


def test_the_last_of_each_list_needs_nothing_and_none_needs_what_only_a_user_can_give():
    for names in (DECODER_ONLY, ENCODER_DECODER):
        assert not ROUTERS[names[-1]].needs
        assert not any(ROUTERS[name].given for name in names)
        assert not any("embeddings" in ROUTERS[name].needs for name in names)  # nor another model


def test_any_other_router_stays(llama, llama_pool):
    routing = Routing(router="arrow")
    assert settled(routing, llama_pool, llama.model) is routing


def test_the_choice_is_told_and_kept_by_name(llama, llama_pool, tmp_path, caplog):
    caplog.set_level(logging.INFO, "phatgoose")
    model = compose(stripped(llama_pool, "readings"), llama, router="auto")
    assert composition_of(model).routing.router == "phatgoose"
    assert caplog.messages[-1] == (
        "Router auto is phatgoose; not every expert has what these need: discriminant (readings)."
    )
    save(model, tmp_path / "routed")
    detach(model)
    kept = json.loads((tmp_path / "routed" / "routed.json").read_text())
    assert kept["routing"]["router"] == "phatgoose"


def test_an_analysis_names_the_router_once(llama, llama_pool):
    task = Task("t", test=(Example("say a", "a", choices=("a", "b")),))
    found = analyse(llama_pool, [task], routers=["auto", "discriminant"], base=llama)
    assert list(found.routers) == ["discriminant"]
