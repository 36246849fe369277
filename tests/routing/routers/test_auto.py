"""Router auto: the first that a base and its experts allow, by name in what comes out."""

from __future__ import annotations

import json
import logging
from dataclasses import replace

import pytest

from phatgoose.config import Routing
from phatgoose.experts.pool import Pool
from phatgoose.routing.compose import compose, composition_of, detach, save
from phatgoose.routing.routers import auto
from phatgoose.routing.routers.auto import BY_TOKEN, first_allowed, settled
from routed_models import with_embeddings

BARE = {"gates": {}, "means": {}, "readings": {}, "embeddings": None}


def stripped(pool: Pool, *parts: str) -> Pool:
    """The pool, whose last expert lacks these `parts`."""
    bare = {part: BARE[part] for part in parts}
    return Pool((*pool.experts[:-1], replace(pool.experts[-1], **bare)))


@pytest.fixture
def embedded(llama_pool, monkeypatch) -> Pool:
    """The pool, whose experts have embeddings of an embedder that is on this machine."""
    monkeypatch.setattr(auto, "can_embed", lambda: True)
    return with_embeddings(llama_pool)


@pytest.mark.parametrize(
    ("lacks", "wanted"),
    [
        ((), "discriminant"),
        (("readings", "gates", "means"), "retrieval"),
        (("readings", "embeddings", "means"), "phatgoose"),
        (("readings", "embeddings", "gates"), "average-activation"),
        (tuple(BARE), "arrow"),
    ],
)
def test_a_decoder_gets_the_first_that_every_expert_allows(llama, embedded, lacks, wanted):
    routing, left = Routing(router="auto", kernel="reference"), stripped(embedded, *lacks)
    found = settled(routing, left, llama.model, llama.tokenizer)
    assert found == Routing(router=wanted, kernel="reference")


def test_an_embedder_that_would_have_to_be_loaded_from_elsewhere_is_passed(
    llama, embedded, monkeypatch
):
    unread = stripped(embedded, "readings")
    first, *rest = unread.experts
    other = replace(first, info=replace(first.info, embedder="them/theirs"))
    routing = Routing(router="auto")
    assert settled(routing, unread, llama.model, llama.tokenizer).router == "retrieval"
    found = settled(routing, Pool((other, *rest)), llama.model, llama.tokenizer)
    assert found.router == "phatgoose"
    monkeypatch.setattr(auto, "can_embed", lambda: False)
    assert settled(routing, unread, llama.model, llama.tokenizer).router == "phatgoose"


@pytest.mark.parametrize("kind", ["t5"], indirect=True)
def test_an_encoder_decoder_gets_the_papers(base, pool):
    assert settled(Routing(), pool, base.model, base.tokenizer).router == "phatgoose"
    bare = stripped(pool, "gates", "means")
    assert settled(Routing(), bare, base.model, base.tokenizer).router == "arrow"


def test_where_prompts_come_in_pieces_auto_goes_by_tokens(llama_pool, embedded):
    assert first_allowed(Routing(), embedded, BY_TOKEN).router == "phatgoose"
    assert (
        first_allowed(Routing(), stripped(llama_pool, "gates", "means"), BY_TOKEN).router == "arrow"
    )


def test_the_choice_is_told_and_kept_by_name(llama, llama_pool, tmp_path, caplog):
    caplog.set_level(logging.INFO, "phatgoose")
    model = compose(stripped(llama_pool, "readings"), llama, router="auto")
    assert composition_of(model).routing.router == "phatgoose"
    assert caplog.messages[-1] == (
        "Router auto is phatgoose; routers tried before it need readings (phatgoose stats), "
        "embeddings (phatgoose stats) of all experts."
    )
    save(model, tmp_path / "routed")
    detach(model)
    kept = json.loads((tmp_path / "routed" / "routed.json").read_text())
    assert kept["routing"]["router"] == "phatgoose"
