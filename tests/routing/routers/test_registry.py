"""Every router of the registry; its settings as text, and texts that are none."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fake_packages import install
from phatgoose.errors import ConfigError, PoolError
from phatgoose.experts.pool import Pool
from phatgoose.routing.compose import compose, detach
from phatgoose.routing.composition import composition_of
from phatgoose.routing.routers import registry
from phatgoose.routing.routers.registry import (
    ROUTERS,
    choice_of,
    spec_of,
    split_routers,
)
from phatgoose.tasks.batching import pad_left, pad_right
from routed_models import compose_by, with_embeddings
from tiny import logits_of, make_ids, random
from topic_prompts import experts_of


@pytest.mark.parametrize("router", ROUTERS)
def test_weights_of_every_router_sum_to_one(llama, llama_pool, toy_embedder, router):
    model = compose_by(router, llama_pool, llama)
    if composition_of(model).context and router != "oracle":
        composition_of(model).context.use(experts_of(model, ("plums", "1 + 2", "WHO?")))
    for layer in composition_of(model).layers.values():
        decision = layer.router(random(6, layer.in_features))
        assert decision.experts.shape == decision.weights.shape
        assert decision.experts.dtype == torch.int64
        assert decision.weights.dtype == torch.float32
        torch.testing.assert_close(decision.weights.sum(dim=-1), torch.ones(6))
        chosen = decision.experts.sort(dim=-1).values
        assert chosen.diff(dim=-1).ne(0).all()  # nobody twice


@pytest.mark.parametrize("router", ROUTERS)
def test_every_router_leaves_the_base_as_it_was(base, pool, toy_embedder, router):
    ids, plain = make_ids(rows=2), dict(base.model.named_modules())
    attributes, wanted = set(vars(base.model)), logits_of(base.model, ids)
    assert not torch.equal(logits_of(compose_by(router, pool, base), ids), wanted)
    detach(base.model)
    assert dict(base.model.named_modules()) == plain
    assert set(vars(base.model)) == attributes
    for module in base.model.modules():
        assert not module._forward_pre_hooks
        assert not module._forward_hooks
    assert torch.equal(logits_of(base.model, ids), wanted)


@pytest.mark.parametrize("router", [router for router in ROUTERS if router != "random"])
@pytest.mark.parametrize("kind", ["llama", "t5"], indirect=True)
def test_every_router_generates_a_padded_batch_as_its_rows_alone(base, pool, toy_embedder, router):
    model = compose_by(router, pool, base)
    long, short = make_ids(tokens=9), make_ids(tokens=5, seed=1)
    pad = pad_right if base.is_encoder_decoder else pad_left
    ids = pad([long[0].tolist(), short[0].tolist()], 0)
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    got = model.generate(ids, attention_mask=ids.ne(0).long(), **options)
    for row, alone in zip(got, (long, short), strict=True):
        wanted = model.generate(alone, attention_mask=torch.ones_like(alone), **options)
        assert torch.equal(row[-5:], wanted[0, -5:])


@pytest.mark.parametrize("router", ["phatgoose", "arrow", "random", "discriminant"])
def test_a_k_above_the_pool_is_told_where_k_matters(llama, llama_pool, router):
    with pytest.warns(UserWarning, match="k is 5, but the pool has 4 experts"):
        compose(llama_pool, llama, router=router, k=5)


@pytest.mark.parametrize("router", ["merged", "single", "oracle", "best-individual"])
def test_a_k_above_the_pool_is_not_told_where_k_does_not_matter(llama, llama_pool, router):
    compose_by(router, llama_pool, llama, k=5)


def test_the_routers_own_k_is_lowered_without_a_word(llama, llama_pool):
    """Nobody asked for it; warnings are errors here."""
    compose(llama_pool, llama, keep=["e0"], router="phatgoose")
    with pytest.warns(UserWarning, match="k is 3, but the pool has 1 expert;"):
        compose(llama_pool, detach(llama.model), keep=["e0"], k=3, router="phatgoose")


NEEDED = [  # by router: a part that e0 lacks, and what is said then
    ("phatgoose", "gates", "'e0' has no gates"),
    ("average-activation", "means", "'e0' has no means"),
    ("discriminant", "readings", "'e0' has no readings: run 'phatgoose stats'"),
    ("retrieval", "embeddings", "'e0' has no embeddings"),
]


@pytest.mark.parametrize(("router", "part", "message"), NEEDED)
def test_experts_that_lack_what_a_router_needs_are_named(llama, llama_pool, router, part, message):
    first, *rest = with_embeddings(llama_pool).experts
    bare = replace(first, **{part: None if part == "embeddings" else {}})
    with pytest.raises(PoolError, match=message):
        compose(Pool((bare, *rest)), llama, router=router)


@pytest.mark.parametrize("router", ["arrow", "spectr"])
def test_routers_that_read_factors_name_the_experts_without_any(llama, llama_mixed, router):
    with pytest.raises(PoolError, match=r"'ia32' \(ia3\), 'bottleneck3' \(bottleneck\)"):
        compose(llama_mixed, llama, router=router)
    assert not hasattr(llama.model, "phatgoose")


# A router and its settings as text


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("merged", "merged"),
        ("arrow:form=svd", "arrow"),
        ("phatgoose:temperature=0.50,eps=1e-3", "phatgoose:eps=0.001,temperature=0.5"),
        ("discriminant:task_variance=2.0,shrinkage=0.3", "discriminant:task_variance=2"),
        ("random:seed=3", "random:seed=3"),
        ("spectr:shortlist=2", "spectr:shortlist=2"),
        ("single:expert=7", "single:expert=7"),
    ],
)
def test_a_text_has_only_what_is_not_usual_in_the_order_of_the_fields(text, canonical):
    assert choice_of(text).text == canonical
    assert choice_of(canonical) == choice_of(text)


def test_a_model_keeps_the_canonical_text(llama, llama_pool):
    model = compose(llama_pool, llama, router="arrow:temperature=2,form=peft", k=3)
    assert composition_of(model).routing.router == "arrow:form=peft,temperature=2"


LONG = "x" * 100_000


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("best", "router is 'best', but must be one of auto, random"),
        ("arrow:frm=peft", "router arrow: unknown setting 'frm'; known are form, temperature"),
        ("merged:k=2", "router merged: unknown setting 'k'; known are none"),
        ("arrow:form=qr", "router arrow: form is 'qr', but must be one of svd, peft"),
        ("arrow:peft", "arrow:SETTING=VALUE"),
        ("arrow:form=peft,form=svd", "each once"),
        ("random:seed=one", "seed is 'one', but must be a whole number"),
        ("spectr:shortlist=0", "shortlist is 0, but must be at least 1"),
        ("phatgoose:eps=0", "eps is 0.0, but must be above 0"),
        ("auto:form=peft", "Router auto has no settings"),
        (LONG, "router is 'xxx"),
        (f"arrow:{LONG}", "router is 'arrow:xxx"),
        (f"arrow:{LONG}=1", "unknown setting 'xxx"),
        (f"arrow:form={LONG}", "form is 'xxx"),
        (f"random:seed={LONG}", "seed is 'xxx"),
    ],
    ids=lambda text: text[:40],
)
def test_what_can_not_be_is_refused_in_a_line(text, message):
    with pytest.raises(ConfigError, match=message) as caught:
        choice_of(text)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_a_routers_setting_is_none_of_compose(llama, llama_pool):
    with pytest.raises(ConfigError, match="unknown setting 'arrow'; known are router, k, kernel"):
        compose(llama_pool, llama, arrow="peft")


def test_lists_of_routers_are_split_between_them_only():
    texts = ["arrow:form=peft,temperature=2,phatgoose,all", "random:seed=1", "k=2"]
    wanted = ["arrow:form=peft,temperature=2", "phatgoose", "all", "random:seed=1,k=2"]
    assert split_routers(texts) == wanted


# Routers of other packages

THEIRS = """
from typing import Annotated
from dataclasses import dataclass
from phatgoose.config import Settings
from phatgoose.routing.routers.registry import RouterSpec

@dataclass(frozen=True)
class Config(Settings):
    share: Annotated[float, "A share."] = 0.5

SPEC = RouterSpec("first", "First", "the first expert", "their_code.First", config=Config)
CLASH = RouterSpec("arrow", "Arrow", "another", "their_code.First")
"""
CODE = """
from phatgoose.routing.routers.fixed import Merged

class First(Merged):
    folds = False

    def narrow(self, pool, scores):
        assert self.config.share == 0.25
        return pool.select(pool.names[:1])
"""


@pytest.fixture
def theirs(tmp_path, monkeypatch):
    """An installed package with a router, one that can't be loaded, and one of a taken name."""
    points = {"first": "their_specs:SPEC", "lost": "their_specs:LOST", "arrow": "their_specs:CLASH"}
    install(tmp_path, monkeypatch, "their_specs", THEIRS, {registry.ENTRY_POINTS: points})
    (tmp_path / "their_code.py").write_text(CODE)
    monkeypatch.setattr(registry, "ROUTERS", registry._Registry())
    with pytest.warns(UserWarning) as warned:  # noqa: PT030
        assert "first" in registry.ROUTERS
    return sorted(str(warning.message) for warning in warned)


def test_a_router_of_another_package_is_one_like_ours(theirs, llama, llama_pool, tmp_path):
    model = compose(llama_pool, llama, router="first:share=0.25")
    assert composition_of(model).experts == ("e0",)
    assert list(registry.ROUTERS)[-1] == "first"
    assert registry.known_names()[-2:] == ["first", "lost"]


def test_what_can_not_be_loaded_is_named_and_breaks_nothing_else(theirs):
    assert "arrow of their-specs is left out" in theirs[0]
    assert "lost of their-specs is left out" in theirs[1]
    assert spec_of("arrow").summary != "another"
    with pytest.raises(ConfigError, match="Router lost can't be loaded from their_specs:LOST"):
        spec_of("lost")
