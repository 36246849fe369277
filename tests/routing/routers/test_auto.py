"""Router auto: the first that a base and its experts allow, by name in what comes out."""

from __future__ import annotations

import json
import logging
from dataclasses import replace

import pytest
import torch

from mixed_experts import make_ia3
from phatgoose.config import Routing
from phatgoose.experts.importing import import_adapter
from phatgoose.experts.pool import Pool
from phatgoose.routing.compose import compose, detach
from phatgoose.routing.composition import composition_of
from phatgoose.routing.routers import auto
from phatgoose.routing.routers.auto import BY_TOKEN, DECODER_ONLY, first_allowed, settled
from phatgoose.routing.routers.registry import class_of
from phatgoose.routing.saved import save
from routed_models import with_embeddings
from tiny import logits_of, make_adapter, make_ids

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


def test_a_model_without_its_tokenizer_gets_none_that_reads_prompts(llama, llama_pool):
    model = compose(llama_pool, llama.model, router="auto")
    assert composition_of(model).routing.router == "phatgoose"
    detach(model)


def test_a_k_that_it_has_no_use_for_is_told(llama, embedded):
    unlike = [replace(each, modules={}) for each in stripped(embedded, *BARE).experts]
    with pytest.warns(UserWarning, match="Router auto is merged, which doesn't use k"):
        found = settled(
            Routing(router="auto", k=5), Pool(tuple(unlike)), llama.model, llama.tokenizer
        )
    assert found == Routing(router="merged", k=5)


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


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize(
    ("make", "wanted"), [(make_adapter, "arrow"), (make_ia3, "merged")], ids=["lora", "ia3"]
)
def test_imported_adapters_alone_are_composed(llama, tmp_path, make, wanted, count):
    for seed in range(count):
        adapter = make(llama, tmp_path / "adapters" / f"e{seed}", seed=seed)
        import_adapter(adapter, tmp_path / "pool" / f"e{seed}", base=llama.id, fingerprint=True)
    before = logits_of(llama.model, make_ids())
    model = compose(tmp_path / "pool", llama)
    assert composition_of(model).routing.router == wanted
    assert not torch.equal(logits_of(model, make_ids()), before)
    detach(model)


def test_where_prompts_come_in_pieces_auto_goes_by_tokens(llama_pool, embedded):
    assert first_allowed(Routing(), embedded, BY_TOKEN).router == "phatgoose"
    assert (
        first_allowed(Routing(), stripped(llama_pool, "gates", "means"), BY_TOKEN).router == "arrow"
    )


def test_the_last_of_each_list_needs_nothing_and_none_needs_what_only_a_user_can_give():
    for names in (DECODER_ONLY, BY_TOKEN):
        assert not class_of(names[-1]).needs
        assert not any(class_of(name).given for name in names)


def test_the_choice_is_told_and_kept_by_name(llama, llama_pool, tmp_path, caplog):
    caplog.set_level(logging.INFO, "phatgoose")
    model = compose(stripped(llama_pool, "readings"), llama, router="auto")
    assert composition_of(model).routing.router == "phatgoose"
    assert caplog.messages[-1] == (
        "Router auto is phatgoose; routers tried before it need readings of all experts (1 of 4 "
        "lack them), embeddings (phatgoose stats)."
    )
    save(model, tmp_path / "routed")
    detach(model)
    kept = json.loads((tmp_path / "routed" / "routed.json").read_text())
    assert kept["routing"]["router"] == "phatgoose"
