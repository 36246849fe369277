"""Engines of OpenAI's protocol alone, where an expert is a model's name; a stand-in is asked."""

import pytest

from fake_engine import ASK, BASE, NAMES, engine_of, gateway, numbered
from phatgoose.apps.server import Upstream
from phatgoose.errors import ConfigError
from phatgoose.experts.pool import Pool
from serving import CHATS, PATH, ask, error_of, health_of, text_of, until
from topic_prompts import OWNERS, PROMPTS

pytestmark = pytest.mark.usefixtures("embedder_for_all")


@pytest.mark.parametrize(
    ("listed", "template", "sent"),
    [
        ("{}", "{expert}", "{}"),
        (f"{BASE}:{{}}", f"{BASE}:{{expert}}", f"{BASE}:{{}}"),
        ("{}:latest", "{expert}:latest", "{}:latest"),  # as Ollama has it
        ("{}", f"{BASE}:{{expert}}", f"{BASE}:{{}}"),  # as SGLang has it
    ],
)
def test_an_expert_is_asked_by_the_name_that_the_template_makes(place, listed, template, sent):
    adapters = numbered([listed.format(name) for name in NAMES])
    options = {"model_name": template, "default": BASE, "router": "retrieval"}
    with engine_of("other", adapters) as engine, gateway(place, engine, **options) as client:
        for prompt, owner in zip(PROMPTS, OWNERS, strict=True):
            reply = client.post(PATH, json={**ASK, "prompt": prompt})
            assert reply.headers["x-phatgoose-experts"] == f"{owner}=1"
            assert reply.json()["choices"][0]["text"].split()[0] == sent.format(owner)
        assert not {"top_k", "min_p", "cache_salt", "lora"} & engine.requests[-1].keys()
        for model in (BASE, "auto"):  # a chat that says nothing fits no expert
            blank = [{"role": "user", "content": " "}]
            ask(client, path=CHATS, model=model, messages=blank)
            assert engine.requests[-1]["model"] == BASE
        cards = client.get("/v1/models").json()["data"]
        assert (cards[0]["base"], cards[0]["context"]) == (BASE, 512)
        error = error_of(client, **ASK, weights={"e0": 0.5, "e1": 0.5})
        assert error["message"] == "The engine applies one expert with the weight 1; it can't mix."
        engine.stop()
        until(lambda: health_of(client)["upstream"] == "away")
        engine.start()
        until(lambda: health_of(client)["upstream"] == "ok")
        assert not engine.loaded


def test_the_base_is_called_as_the_experts_name_it_unless_another_is_named(place):
    base = Pool.open(place).base.id
    with engine_of("other", numbered([f"{base}:{name}" for name in NAMES])) as engine:
        engine.base = base
        with gateway(place, engine, model_name="{base}:{expert}") as client:
            assert text_of(client, **ASK | {"model": "e1"}).startswith(f"{base}:e1 ")
            assert text_of(client, **ASK | {"model": base}).startswith(f"{base} ")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, "is neither vLLM nor llama.cpp. If it has OpenAI's protocol, say what it calls"),
        ({"model_name": "{expert}"}, "for what fits no expert; it has the-base, e0, e2"),
        (
            {"model_name": "x/{expert}", "default": BASE},
            "lacks e1, e3 (it reads adapters when it starts). Its models must list them as x/{expe",
        ),
    ],
)
def test_what_is_missing_at_such_an_engine_is_a_line_of_the_log(place, caplog, change, said):
    with (
        engine_of("other", numbered(("e0", "e2")), loads=False) as engine,
        gateway(place, engine, ready=False, **change) as client,
    ):
        until(lambda: "can't be used" in caplog.text)
        assert error_of(client, 503, **ASK)["code"] == "upstream_unavailable"
    (line,) = [each.getMessage() for each in caplog.records if "be used" in each.getMessage()]
    assert said in line


def test_vllm_says_itself_what_it_has(place):
    with (
        engine_of("vllm", {}) as engine,
        gateway(place, engine, model_name="x/{expert}", default="y") as client,
    ):
        assert text_of(client, **ASK | {"model": "e1"}).startswith("e1 ")
        assert len(engine.loaded) == 4
        assert text_of(client, **ASK | {"model": BASE}).startswith(f"{BASE} ")


@pytest.mark.parametrize(
    ("model_name", "default", "said"),
    [
        ("reviews", None, r"--model-name is 'reviews', but must have \{expert\} once"),
        ("{expert}{expert}", None, r"must have \{expert\} once"),
        ("{name}:{expert}", None, r"may have \{base\}, as in '\{base\}:\{expert\}'"),
    ],
)
def test_odd_names_are_refused_in_the_operator_s_words(model_name, default, said):
    with pytest.raises(ConfigError, match=said):
        Upstream("http://host", None, model_name, default)


def test_the_command_wants_an_engine_for_its_names(phat, place):
    outcome = phat("serve", place, "--model-name", "{expert}")
    assert outcome.code == 2
    assert "--model-name and --default are for an engine: give its --upstream too." in outcome.err
    outcome = phat("serve", place, "--upstream", "http://127.0.0.1:9", "--model-name", "reviews")
    assert outcome.code == 2
    assert "--model-name is 'reviews', but must have {expert} once" in outcome.err
