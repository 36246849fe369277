"""Experts no better than the base: they are named at start, and may leave their prompts to it."""

import json
import logging
import shutil

import pytest

from fake_engine import ASK, NAMES, engine_of
from phatgoose.apps.server import ServedModel, Upstream, create_app
from phatgoose.config import Routing
from phatgoose.errors import ConfigError, RoutingError
from phatgoose.experts.expert import LAYOUT, Expert
from phatgoose.routing.compose import compose, save
from serving import GREEDY, PATH, ask, client_of, until
from topic_prompts import OWNERS, PROMPTS

GAINS = {"e0": (0.02, -0.125), "e1": (0.5, 0.25)}  # value and low; nothing is known of e2 and e3

pytestmark = pytest.mark.usefixtures("embedder_for_all")


@pytest.fixture
def recorded(place, tmp_path):
    """The pool with the gains."""
    folder = shutil.copytree(place, tmp_path / "experts")
    for name, (value, low) in GAINS.items():
        path = folder / name / LAYOUT.info
        gain = {"value": value, "low": low, "high": 1.0, "rows": 30, "metric": "exact match"}
        path.write_text(json.dumps(json.loads(path.read_text()) | {"gain": gain}))
    return str(folder)


@pytest.fixture(params=["own", "gateway"])
def opened(request, recorded):
    """A function from fields of `ServedModel` to the application, ours or a gateway."""
    with engine_of() as engine:
        upstreams = [Upstream(engine.url)] if request.param == "gateway" else []

        def app_with(router="retrieval", **fields):
            model = ServedModel("goose", recorded, Routing(router), dtype="float32", **fields)
            return create_app([model], upstreams=upstreams)

        yield app_with


def answered_by(client, **changes):
    """Who answered each prompt, as the header tells."""
    body = {**(GREEDY if "goose" in str(changes) else ASK), **changes}
    reply = client.post(PATH, json={**body, "max_tokens": 2})
    assert reply.status_code == 200, reply.text
    header = reply.headers["x-phatgoose-experts"]
    return tuple(part.partition("=")[0] for part in header.split("; "))


@pytest.mark.parametrize("only_better", [False, True])
def test_the_base_answers_prompts_of_experts_that_are_no_better(opened, only_better, caplog):
    with caplog.at_level(logging.WARNING), client_of(opened(only_better=only_better)) as client:
        until(lambda: client.get("/healthz").status_code == 200)
        (line, *unknown) = [text for text in caplog.messages if "the base" in text]
        assert "e0 (+2 points [-12, +100] on 30 rows)" in line
        assert "e1" not in line
        assert [name for name in NAMES if name in "".join(unknown)] == only_better * ["e2", "e3"]
        wanted = tuple("base" if only_better and name == "e0" else name for name in OWNERS)
        assert answered_by(client, model="goose", prompt=list(PROMPTS)) == wanted
        assert answered_by(client, model="goose:e0", prompt=PROMPTS[0]) == ("e0",)
        kept = {"model": "goose", "prompt": [PROMPTS[0]], "keep": ["e0", "e1"]}
        assert answered_by(client, **kept) == wanted[:1]


def test_what_is_left_to_the_base_is_answered_by_it(recorded):
    """Word for word, on our own server."""
    base = Expert.load(f"{recorded}/e0").info.base.id
    served = ServedModel("goose", recorded, Routing("retrieval"), dtype="float32", only_better=True)
    body = {**GREEDY, "prompt": PROMPTS[0]}
    texts = []
    for model in (served, ServedModel("goose", base, dtype="float32")):
        with client_of(create_app([model])) as client:
            texts.append(ask(client, **body)["choices"][0]["text"])
    assert texts[0] == texts[1]


def test_routers_for_every_token_and_what_is_no_pool_are_refused(recorded, pool, tmp_path):
    model = ServedModel("goose", recorded, Routing("phatgoose"), dtype="float32", only_better=True)
    with pytest.raises(RoutingError, match=r"--only-better is for .* 'goose' has phatgoose"):
        create_app([model])
    save(compose(pool, router="phatgoose"), tmp_path / "routed")
    routed = ServedModel("goose", str(tmp_path / "routed"), dtype="float32", only_better=True)
    with pytest.raises(ConfigError, match="is not a pool"):
        create_app([routed])
