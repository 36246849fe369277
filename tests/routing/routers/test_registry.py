"""Routers as text, routers of other packages, and auto: the first that base and experts allow."""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import replace
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec

import pytest

from fake_packages import install
from forked import forked, needs_fork
from phatgoose.base.loading import load_base
from phatgoose.config import Routing
from phatgoose.errors import ConfigError, ExpertError, RoutingError
from phatgoose.experts.pool import Pool
from phatgoose.names import MINILM
from phatgoose.routing.compose import compose, composition_of, detach, load, save
from phatgoose.routing.routers import registry
from phatgoose.routing.routers.auto import BY_TOKEN, first_allowed, resolved
from phatgoose.routing.routers.phatgoose import Phatgoose
from phatgoose.routing.routers.registry import split_routers
from phatgoose.routing.routers.router import Router, all_routers, canonical, class_of
from routed_models import with_embeddings


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("merged", "merged"),
        ("arrow:form=svd", "arrow"),
        ("phatgoose:temperature=0.50,eps=1e-3", "phatgoose:eps=0.001,temperature=0.5"),
        ("discriminant:task_variance=2.0,shrinkage=0.3", "discriminant:task_variance=2"),
        ("single:expert=7", "single:expert=7"),
        ("weights:e0=1", "weights:e0=1.0"),
    ],
)
def test_a_text_has_only_what_is_not_usual_in_the_order_of_the_fields(text, wanted):
    assert canonical(text) == wanted
    assert canonical(wanted) == wanted


LONG = "x" * 100_000


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("best", "router is 'best', but must be one of auto, random"),
        ("arrow:frm=peft", "router arrow: unknown setting 'frm'; known are form, temperature"),
        ("arrow:form=qr", "router arrow: form is 'qr', but must be 'svd' or 'peft'"),
        ("arrow:peft", "arrow:SETTING=VALUE"),
        ("arrow:form=peft,form=svd", "each once"),
        ("random:seed=one", "seed is 'one', but must be a valid integer"),
        ("phatgoose:eps=0", "eps is '0', but must be greater than 0"),
        ("weights:e0", "weights are 'e0', but must be experts, each once"),
        (LONG, "router is 'xxx"),
        (f"random:seed={LONG}", "seed is 'xxx"),
    ],
    ids=lambda text: text[:40],
)
def test_what_can_not_be_is_refused_in_a_line(text, message):
    with pytest.raises(ConfigError, match=message) as caught:
        canonical(text)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_a_model_keeps_the_canonical_text(llama, llama_pool):
    model = compose(llama_pool, llama, router="arrow:temperature=2,form=peft", k=3)
    assert composition_of(model).routing.router == "arrow:form=peft,temperature=2"


def test_lists_of_routers_are_split_between_them_only():
    texts = ["arrow:form=peft,temperature=2,phatgoose,all", "weights:a-b=1", "c.d=2"]
    wanted = ["arrow:form=peft,temperature=2", "phatgoose", "all", "weights:a-b=1,c.d=2"]
    assert split_routers(texts) == wanted


THEIRS = """
from dataclasses import dataclass
from typing import Annotated
from phatgoose.routing.routers.fixed import Merged

@dataclass(frozen=True)
class First(Merged):
    "The first expert."

    name, label, folds = "first", "First", False
    share: Annotated[float, "A share."] = 0.5

    def narrow(self, pool, scores):
        assert self.share == 0.25
        return pool.select(pool.names[:1])

@dataclass(frozen=True)
class Short(Merged):
    name, label, folds, sizes = "short", "Short", False, {"vectors": "En"}

    def table(self, pool, site):
        return {"vectors": pool.vectors("gates", site)[:1]}

@dataclass(frozen=True)
class Clash(Merged):
    name = "arrow"
"""


@needs_fork
@pytest.mark.filterwarnings("ignore:phatgoose.routers")
def test_routers_of_another_package_are_like_ours_and_what_is_broken_is_named(
    llama, llama_pool, tmp_path, monkeypatch
):
    names = {"first": "First", "short": "Short", "lost": "Lost", "arrow": "Clash"}
    points = {name: f"their_code:{each}" for name, each in names.items()}
    install(tmp_path, monkeypatch, "their_code", THEIRS, {registry.ENTRY_POINTS: points})
    assert forked(lambda: they_are(llama, llama_pool, tmp_path)) == 0


def they_are(llama, llama_pool, tmp_path):
    """In a process of its own, since its routers are there for good, and "arrow" is another."""
    Router.defined.clear()
    assert {"first", "lost"} <= set(registry.known_names())
    with pytest.warns(UserWarning) as warned:  # noqa: PT030
        assert all_routers()["first"].listed().summary == "The first expert"
    said = sorted(str(warning.message) for warning in warned)
    assert "arrow of their-code is left out: " in said[0]
    assert "the name is taken" in said[0]
    assert "lost of their-code is left out" in said[1]
    with pytest.raises(ConfigError, match="router is 'lost', but must be one of auto, random"):
        class_of("lost")
    assert class_of("arrow").label == "Arrow"
    model = compose(llama_pool, llama, router="first:share=0.25")
    assert composition_of(model).experts == ("e0",)
    save(model, tmp_path / "routed")
    detach(model)
    loaded = composition_of(load(tmp_path / "routed", llama))
    assert loaded.router == class_of("first")(share=0.25)
    with pytest.raises(ExpertError, match=r"router short: vectors is \(1, .*; wanted \(4, "):
        compose(llama_pool, load_base(llama.id), router="short")
    Router.defined.clear()
    (tmp_path / "their_code-1.0.dist-info" / "entry_points.txt").unlink()
    with pytest.raises(RoutingError, match=r"routed\.json is not valid: router is 'first:share"):
        load(tmp_path / "routed")


def test_a_subclass_with_scores_of_its_own_is_not_scored_by_a_kernel():
    class Opposite(Phatgoose):
        def scores(self, u, table):
            return -super().scores(u, table)

    assert Phatgoose.fused
    assert not Opposite.fused


# Auto

BARE = {"gates": {}, "means": {}, "prompt_statistics": {}, "embeddings": None}


def stripped(pool: Pool, *parts: str) -> Pool:
    """The pool, whose last expert lacks these `parts`."""
    bare = {part: BARE[part] for part in parts}
    return Pool((*pool.experts[:-1], replace(pool.experts[-1], **bare)))


def make_installed(monkeypatch, there: bool) -> None:
    """What embeds by default is installed as far as Python can tell, or not."""
    for name in ("sentence_transformers", MINILM):
        module = module_from_spec(ModuleSpec(name, None)) if there else None
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.parametrize(
    ("lacks", "embeds", "chosen"),
    [
        ((), True, "discriminant"),
        (("prompt_statistics", "gates", "means"), True, "retrieval"),
        # The embedder would have to be loaded from elsewhere.
        (("prompt_statistics",), False, "phatgoose"),
        (("prompt_statistics", "embeddings", "means"), True, "phatgoose"),
        (("prompt_statistics", "embeddings", "gates"), True, "average-activation"),
        (tuple(BARE), True, "arrow"),
    ],
)
def test_auto_is_the_first_that_every_expert_allows(
    llama, llama_pool, monkeypatch, lacks, embeds, chosen
):
    make_installed(monkeypatch, embeds)
    routing = Routing(router="auto", kernel="reference")
    pool = stripped(with_embeddings(llama_pool), *lacks)
    found = resolved(routing, pool, llama.tokenizer)
    assert found == Routing(router=chosen, kernel="reference")


def test_an_embedder_of_a_stranger_is_passed(llama, llama_pool, monkeypatch):
    make_installed(monkeypatch, True)
    first, *rest = stripped(with_embeddings(llama_pool), "prompt_statistics").experts
    other = replace(first, info=replace(first.info, embedder="them/theirs"))
    found = resolved(Routing(), Pool((other, *rest)), llama.tokenizer)
    assert found.router == "phatgoose"


@pytest.mark.parametrize("kind", ["llama", "t5"], indirect=True)
def test_without_a_tokenizer_and_for_prompts_in_pieces_tokens_are_routed(base, pool):
    assert resolved(Routing(), pool, base.tokenizer).router == "discriminant"
    for allowed, chosen in ((pool, "phatgoose"), (stripped(pool, "gates", "means"), "arrow")):
        assert resolved(Routing(), allowed, None).router == chosen
        assert first_allowed(Routing(), allowed, BY_TOKEN).router == chosen


def test_the_choice_is_told_and_kept_by_name(llama, llama_pool, tmp_path, caplog):
    caplog.set_level(logging.INFO, "phatgoose")
    model = compose(stripped(llama_pool, "prompt_statistics"), llama, router="auto")
    assert composition_of(model).routing.router == "phatgoose"
    assert caplog.messages[-1] == (
        "Router auto is phatgoose; routers tried before it need prompt_statistics (phatgoose "
        "stats), embeddings (phatgoose stats) of all experts."
    )
    detach(model)
    bare = stripped(llama_pool, "gates", "means", "prompt_statistics")
    model = compose(bare, llama, router="auto")
    assert caplog.messages[-1].startswith("Router auto is arrow, hardly better than the base alone")
    assert "three example prompts an adapter change that: phatgoose stats" in caplog.messages[-1]
    save(model, tmp_path / "routed")
    kept = json.loads((tmp_path / "routed" / "routed.json").read_text())
    assert kept["routing"]["router"] == "arrow"
