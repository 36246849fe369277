"""Router auto: the first that a base and its experts allow, by name in what comes out."""

from __future__ import annotations

import json
import logging
from dataclasses import replace

import pytest

from phatgoose.config import Routing
from phatgoose.experts.pool import Pool
from phatgoose.routing.compose import compose, composition_of, save
from phatgoose.routing.routers import auto
from phatgoose.routing.routers.auto import BY_TOKEN, first_allowed, settled
from routed_models import with_embeddings

BARE = {"gates": {}, "means": {}, "readings": {}, "embeddings": None}


def stripped(pool: Pool, *parts: str) -> Pool:
    """The pool, whose last expert lacks these `parts`."""
    bare = {part: BARE[part] for part in parts}
    return Pool((*pool.experts[:-1], replace(pool.experts[-1], **bare)))


@pytest.mark.parametrize(
    ("lacks", "embeds", "chosen"),
    [
        ((), True, "discriminant"),
        (("readings", "gates", "means"), True, "retrieval"),
        (("readings",), False, "phatgoose"),  # the embedder would have to be loaded from elsewhere
        (("readings", "embeddings", "means"), True, "phatgoose"),
        (("readings", "embeddings", "gates"), True, "average-activation"),
        (tuple(BARE), True, "arrow"),
    ],
)
def test_a_decoder_gets_the_first_that_every_expert_allows(
    llama, llama_pool, monkeypatch, lacks, embeds, chosen
):
    monkeypatch.setattr(auto, "can_embed", lambda: embeds)  # as if it were installed, or not
    routing = Routing(router="auto", kernel="reference")
    pool = stripped(with_embeddings(llama_pool), *lacks)
    found = settled(routing, pool, llama.model, llama.tokenizer)
    assert found == Routing(router=chosen, kernel="reference")


def test_an_embedder_of_a_stranger_is_passed(llama, llama_pool, monkeypatch):
    monkeypatch.setattr(auto, "can_embed", lambda: True)
    first, *rest = stripped(with_embeddings(llama_pool), "readings").experts
    other = replace(first, info=replace(first.info, embedder="them/theirs"))
    found = settled(Routing(), Pool((other, *rest)), llama.model, llama.tokenizer)
    assert found.router == "phatgoose"


@pytest.mark.parametrize("kind", ["t5"], indirect=True)
def test_encoder_decoders_and_prompts_in_pieces_are_routed_by_tokens(base, pool):
    for allowed, chosen in ((pool, "phatgoose"), (stripped(pool, "gates", "means"), "arrow")):
        assert settled(Routing(), allowed, base.model, base.tokenizer).router == chosen
        assert first_allowed(Routing(), allowed, BY_TOKEN).router == chosen


def test_the_choice_is_told_and_kept_by_name(llama, llama_pool, tmp_path, caplog):
    caplog.set_level(logging.INFO, "phatgoose")
    model = compose(stripped(llama_pool, "readings"), llama, router="auto")
    assert composition_of(model).routing.router == "phatgoose"
    assert caplog.messages[-1] == (
        "Router auto is phatgoose; routers tried before it need readings (phatgoose stats), "
        "embeddings (phatgoose stats) of all experts."
    )
    save(model, tmp_path / "routed")
    kept = json.loads((tmp_path / "routed" / "routed.json").read_text())
    assert kept["routing"]["router"] == "phatgoose"
