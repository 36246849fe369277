"""Every router of the registry; its settings as text; texts and fields that are none any more."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fake_packages import install
from phatgoose.config import settings_of
from phatgoose.errors import ConfigError, PoolError
from phatgoose.evaluation.comparison.methods import lacking
from phatgoose.experts.pool import Pool
from phatgoose.routing.compose import compose, detach
from phatgoose.routing.composition import composition_of
from phatgoose.routing.routers import registry
from phatgoose.routing.routers.registry import (
    ROUTERS,
    SETTINGS,
    choice_of,
    spec_of,
    split_routers,
    translated,
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
    ("discriminant-phatgoose", "readings", "'e0' has no readings"),
    ("discriminant-phatgoose", "gates", "'e0' has no gates"),
    ("joint-discriminant", "readings", "'e0' has no readings"),
    ("joint-discriminant", "embeddings", "'e0' has no embeddings"),
    ("glider", "gates", "'e0' has no gates"),
    ("glider", "embeddings", "'e0' has no embeddings"),
]


@pytest.mark.parametrize(("router", "part", "message"), NEEDED)
def test_experts_that_lack_what_a_router_needs_are_named(llama, llama_pool, router, part, message):
    first, *rest = with_embeddings(llama_pool).experts
    bare = replace(first, **{part: None if part == "embeddings" else {}})
    with pytest.raises(PoolError, match=message):
        compose(Pool((bare, *rest)), llama, router=router)


@pytest.mark.parametrize("router", ["arrow", "spectr", "logo"])
def test_routers_that_read_factors_name_the_experts_without_any(llama, llama_mixed, router):
    with pytest.raises(PoolError, match=r"'ia32' \(ia3\), 'bottleneck3' \(bottleneck\)"):
        compose(llama_mixed, llama, router=router)
    assert not hasattr(llama.model, "phatgoose")
    without = [expert.name for expert in llama_mixed.experts if not expert.lora]
    assert list(lacking(llama_mixed)[router]) == without


# A router and its settings as text


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("merged", "merged"),
        ("arrow:form=svd", "arrow"),
        (
            "phatgoose:temperature=0.50,affinity=calibrated",
            "phatgoose:affinity=calibrated,temperature=0.5",
        ),
        ("glider:weight=7.0,eps=0.00001", "glider:weight=7"),
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
        ("arrow:form=qr", "router arrow: form is 'qr', but must be one of svd, peft, mttl"),
        ("arrow:peft", "arrow:SETTING=VALUE"),
        ("arrow:form=peft,form=svd", "each once"),
        ("random:seed=one", "seed is 'one', but must be a whole number"),
        ("spectr:shortlist=0", "shortlist is 0, but must be at least 1"),
        ("logo:reads=end", "reads is 'end', but must be one of block, site"),
        ("phatgoose:eps=0", "eps is 0.0, but must be above 0"),
        ("auto:form=peft", "Router auto has no settings"),
        ("phatgoose-input", "has left phatgoose; use discriminant instead"),
        ("phatgoose-evidence:prior=1", "has left phatgoose; use discriminant-phatgoose instead"),
        ("phatgoose:affinity=raw", "affinity raw has left phatgoose; use calibrated"),
        ("phatgoose:stand_in=true", "stand_in has left phatgoose"),
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


def test_settings_of_compose_are_refused_by_what_to_do_now(llama, llama_pool):
    for settings, message in (
        ({"stand_in": True}, "compose: stand_in has left phatgoose"),
        ({"input_k": 2}, "input_k is k now"),
        ({"arrow": "peft"}, "unknown setting 'arrow'; known are router, k, kernel, embedder"),
    ):
        with pytest.raises(ConfigError, match=message):
            compose(llama_pool, llama, **settings)


def test_lists_of_routers_are_split_between_them_only():
    texts = ["arrow:form=peft,temperature=2,phatgoose,all", "random:seed=1", "k=2"]
    wanted = ["arrow:form=peft,temperature=2", "phatgoose", "all", "random:seed=1,k=2"]
    assert split_routers(texts) == wanted


# Routings of the time when every setting was a field of `Routing`

USUAL = {
    "k": 2,
    "kernel": "auto",
    "eps": 1e-5,
    "expert": None,
    "arrow": "svd",
    "spectr_shortlist": None,
    "logo_reads": "block",
    "glider_lambda": 3.0,
    "router_seed": 0,
    "stand_in": False,
    "affinity": "standardised",
    "router_temperature": 1.0,
    "retrieval_form": "prompt",
    "reading_place": "both",
    "reading_from": 0.0,
    "reading_to": 1.0,
    "shrinkage": 0.3,
    "task_variance": 0.0,
    "embedding_share": 0.5,
    "prior": 1.0,
    "input_k": None,
    "input_temperature": None,
}
READING = {"reading_place": "end", "reading_from": 0.5, "shrinkage": 0.2, "task_variance": 0.1}
BEFORE = "place=both,task_variance=0"  # defaults of that time which are others now
READ = "place=end,first=0.5,shrinkage=0.2,task_variance=0.1"
THEN = {  # by router: what was changed, and its settings and k now
    "random": ({"router_seed": 7, "k": 3}, "seed=7", 3),
    "retrieval": ({"input_k": 2, "input_temperature": 0.5, "k": 5}, "temperature=0.5", 2),
    "centroid": ({"input_temperature": 0.2}, "", None),
    "average-activation": (
        {"affinity": "calibrated", "router_temperature": 0.5, "eps": 1e-3},
        "eps=0.001,affinity=calibrated,temperature=0.5",
        2,
    ),
    "arrow": ({"arrow": "peft", "router_temperature": 2.0}, "form=peft,temperature=2", 2),
    "spectr": ({"spectr_shortlist": 3}, "shortlist=3", 2),
    "merged": ({"eps": 0.1, "k": 4}, "", None),
    "uniform-top-k": ({"eps": 0.1}, "eps=0.1", 2),
    "phatgoose": ({"eps": 0.1, "arrow": "peft"}, "eps=0.1", 2),
    "glider": (
        {"glider_lambda": 7.0, "router_temperature": 2.0, "affinity": "calibrated"},
        "weight=7,temperature=2",
        2,
    ),
    "logo": ({"logo_reads": "site", "input_k": 2}, "reads=site", 2),
    "discriminant": ({**READING, "input_k": 2}, READ, 2),
    "joint-discriminant": (
        {**READING, "embedding_share": 0.2, "input_temperature": 0.3},
        f"{READ},embedding_share=0.2,temperature=0.3",
        None,
    ),
    "discriminant-phatgoose": (
        {"prior": 0.3, "input_k": 3, "input_temperature": 0.4, "router_temperature": 2.0, "k": 1},
        f"temperature=2,{BEFORE},shortlist=3,shortlist_temperature=0.4,prior=0.3",
        1,
    ),
    "best-individual": ({}, "", None),
    "oracle": ({"input_k": 3}, "", None),
    "single": ({"expert": "e2"}, "expert=e2", None),
}


@pytest.mark.parametrize("router", THEN)
def test_a_routing_of_that_time_becomes_its_routers_text(router):
    changed, settings, k = THEN[router]
    found = translated({"router": router, **USUAL, **changed})
    assert found["router"] == (f"{router}:{settings}" if settings else router)
    assert found.get("k") == k
    assert choice_of(found["router"]).text == found["router"]
    usual = f"{router}:{BEFORE}" if "discriminant" in router else router
    assert translated({"router": router, **USUAL})["router"] == usual
    assert translated({"router": router, "eps": 1e-5})["router"] == usual


def test_every_router_of_that_time_is_known_with_all_its_settings():
    assert THEN.keys() == SETTINGS.keys() - registry.LEFT.keys()
    for router in THEN:
        names = {setting.name for setting in settings_of(ROUTERS[router].config)}
        assert set(SETTINGS[router].values()) - {"stand_in"} == names - {"per_block", "clusters"}


def test_a_routing_of_now_stays_as_it_is_and_of_neither_time_is_refused():
    now = {"router": "arrow:form=peft", "k": None, "kernel": "auto"}
    assert translated(now) == translated({**now, "retrieval_embedder": "a/b"}) == now
    with pytest.raises(ConfigError, match="unknown setting 'bias'"):
        translated({**now, "bias": 1})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"router": "phatgoose-input"}, "use discriminant instead"),
        ({"router": "phatgoose", "affinity": "centred"}, "affinity centred has left"),
        ({"router": "uniform-top-k", "stand_in": True}, "stand_in has left"),
        ({"router": "phatgoose", "stand_in": True}, "stand_in has left"),
        ({"router": "phatgoose", "eps": 0}, "eps is 0"),
    ],
)
def test_what_has_left_is_refused_in_routings_of_that_time(changed, message):
    with pytest.raises(ConfigError, match=message):
        choice_of(translated({**USUAL, **changed})["router"])


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
    assert "arrow is left out" in theirs[0]
    assert "lost of their-specs can't be loaded" in theirs[1]
    assert spec_of("arrow").summary != "another"
    with pytest.raises(ConfigError, match="Router lost can't be loaded from their_specs:LOST"):
        spec_of("lost")
