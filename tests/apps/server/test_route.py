"""Choosing without answering, and answering without choosing, on our own server and the gateway."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch

from discriminants import FOLLOW_UP, some_chats, taught_in
from fake_engine import engine_of, gateway
from forked import forked, needs_fork
from phatgoose.analysis.confusions import confusions
from phatgoose.apps.server import ServedModel, create_app, service
from phatgoose.config import Routing, Serving
from phatgoose.errors import ConfigError, RoutingError
from phatgoose.experts.corrections import Correction, corrections_in
from phatgoose.experts.expert import LAYOUT
from routed_models import TOPICS
from serving import CHAT_TEMPLATE, CHATS, PATH, ask, client_of, counts_of, error_of, until
from tiny import small_reader

ROUTE = "/v1/route"
CHECK = f"{ROUTE}/check"
CORRECTIONS = f"{ROUTE}/corrections"
EXPERTS = "x-phatgoose-experts"
SHADOW = "x-phatgoose-shadow"
AUTO = "discriminant"
TRACE = {"traceparent": f"00-{'a1' * 16}-{'b2' * 8}-01", "tracestate": "vendor=1,other=2"}


@pytest.fixture(scope="module")
def place(pool_of, tmp_path_factory):
    return taught_in(tmp_path_factory.mktemp("route") / "experts", pool_of("llama"))


@pytest.fixture(scope="module")
def engine():
    with engine_of() as engine:
        engine.context = 1 << 14
        yield engine


@contextmanager
def own(place, limits=None, router=AUTO, **options):
    """A client of our own server of the pool as "goose"."""
    models = [ServedModel("goose", str(place), Routing(router), dtype="float32")]
    app = create_app(models, limits, **options)
    for served in app.state.service.models.values():
        served.runner.tokenizer.chat_template = CHAT_TEMPLATE
    with client_of(app, raise_server_exceptions=False) as client:
        yield client


@pytest.fixture(scope="module")
def clients(place, engine):
    with own(place) as ours, gateway(place, engine, router=AUTO) as theirs:
        yield ours, theirs


def told(route):
    """A choice as the header of an answer tells it."""
    rows = []
    for choice in route["choices"]:
        weights = choice["weights"] or {"base": 1}
        rows.append(", ".join(f"{name}={weight:.4g}" for name, weight in weights.items()))
    return "; ".join(rows)


def test_the_choice_is_that_of_the_request_itself(clients):
    chosen = set()
    for client in clients:
        for chat in some_chats(120):
            body = {"model": "goose", "messages": chat, "max_tokens": 1, "n": 1, "stream": False}
            route = ask(client, path=ROUTE, **body)
            reply = client.post(CHATS, json=body)
            assert reply.status_code == 200, reply.text
            assert reply.headers[EXPERTS] == told(route)
            (choice,) = route["choices"]
            assert choice["margin"] == pytest.approx(
                choice["scores"][choice["expert"]] - choice["scores"][choice["runner_up"]]
            )
            chosen.add(choice["expert"])
    assert chosen == {"base", "e0", "e1", "e2", "e3"}


def test_prompts_are_chosen_for_one_by_one_and_no_token_is_computed(clients, engine):
    engine.requests.clear()
    prompts = [TOPICS[2], f"Thanks a lot.\n\n{TOPICS[1]}"]
    for client, model in zip(clients, ("goose", "auto"), strict=True):
        before = counts_of(client)
        route = ask(client, path=ROUTE, model=model, prompt=prompts)
        assert (route["object"], route["router"]) == ("route", AUTO)
        assert [choice["expert"] for choice in route["choices"]] == ["e2", "e1"]
        assert [choice["index"] for choice in route["choices"]] == [0, 1]
        assert route["choices"][1]["view"] == TOPICS[1]
        after = counts_of(client)
        generated = {name for name in after if name.startswith("phatgoose_generated")}
        assert all(after[name] == before.get(name) for name in generated)
        name = 'phatgoose_chosen_total{expert="e2",model="goose"}'
        assert after[name] == before.get(name, 0) + 1
        margins = 'phatgoose_choice_margin_count{expert="e2",model="goose"}'
        assert after[margins] == before.get(margins, 0) + 1
    assert engine.requests == []


def test_an_explanation_has_example_prompts(clients):
    for client in clients:
        asked = {"model": "goose", "prompt": f"{TOPICS[0]} 3"}
        assert ask(client, path=ROUTE, **asked)["choices"][0]["nearest"] == {}
        (choice,) = ask(client, path=f"{ROUTE}?explain=true", **asked)["choices"]
        assert choice["nearest"]["e0"][0] == asked["prompt"]


def test_what_a_request_says_of_its_experts_is_kept_to(clients):
    ours, theirs = clients
    for client in clients:
        named = ask(client, path=ROUTE, model="goose:e3", prompt=TOPICS[0])
        assert named["choices"][0]["weights"] == {"e3": 1.0}
        without = ask(client, path=ROUTE, model="goose", prompt=TOPICS[0], leave_out=["e0"])
        assert "e0" not in without["choices"][0]["scores"]
        by = ask(client, path=ROUTE, model="goose", prompt=TOPICS[0], route_by=TOPICS[1])
        assert by["choices"][0]["expert"] == "e1"
    two = {"model": "goose", "prompt": TOPICS[0], "router": f"{AUTO}:fallback=off", "k": 2}
    mixed = ask(ours, path=ROUTE, **two)
    assert len(mixed["choices"][0]["weights"]) == 2
    alone = ask(theirs, path=ROUTE, **two)  # as vLLM takes it
    assert told(alone) == theirs.post(PATH, json={**two, "max_tokens": 1}).headers[EXPERTS]
    assert len(alone["choices"][0]["weights"]) == 1


def test_routers_by_token_and_bad_bodies_are_refused_in_a_sentence(clients):
    ours = clients[0]
    body = {"model": "goose", "prompt": "hi"}
    error = error_of(ours, path=ROUTE, **body, router="arrow")
    assert "router arrow chooses for every token" in error["message"]
    assert error["message"].count(".") == 1
    assert error_of(ours, path=ROUTE, **body, router="merged")["param"] == "router"
    for client in clients:
        assert error_of(client, path=ROUTE, model="goose")["param"] == "prompt"
        asked = [{"role": "nobody", "content": "hi"}]
        error = error_of(client, path=ROUTE, model="goose", messages=asked)
        assert (error["param"], error["message"].split(":")[0]) == ("messages", "messages.0.role")
        assert error_of(client, 404, ROUTE, model="geese", prompt="hi")["param"] == "model"
        schema = client.get("/openapi.json").json()["paths"][ROUTE]["post"]["requestBody"]
        forms = schema["content"]["application/json"]["schema"]["oneOf"]
        assert len(forms) == 2


def asked_to_check(client, status=200, model="goose", **options):
    reply = client.get(CHECK, params={"model": model}, **options)
    assert reply.status_code == status, reply.text
    return reply.json()


def test_a_check_says_whose_example_prompts_become(clients, place):
    for client in clients:
        checked = asked_to_check(client)
        expected = confusions(str(place))
        assert checked["summary"] == expected.summary
        winners = [(row["owner"], row["winner"]) for row in checked["prompts"]]
        assert winners == [(row.owner, row.winner) for row in expected.prompts]
        assert asked_to_check(client, 404, "geese")["error"]["param"] == "model"


def test_a_pool_is_checked_once_and_not_for_everybody(place, monkeypatch):
    runs = []

    def counted(*given):
        runs.append(given)
        return confusions(*given)

    monkeypatch.setattr(service, "confusions", counted)
    keys = ["all", "some=e0+e1"]
    with own(place, api_keys=keys) as client:
        for _ in range(2):
            asked_to_check(client, headers={"Authorization": "Bearer all"})
        assert len(runs) == 1
        asked_to_check(client, 401)
        error = asked_to_check(client, 403, headers={"Authorization": "Bearer some"})["error"]
        assert "some experts only" in error["message"]
    with own(place, router="arrow") as client:
        assert "isn't routed by discriminant" in asked_to_check(client, 400)["error"]["message"]


def without_statistics(place, pool):
    """A folder of experts' prompts alone."""
    for name in pool.names:
        (place / name).mkdir(parents=True)
        (place / name / LAYOUT.prompts).write_text(
            "\n".join(f"{TOPICS[pool.names.index(name)]} {n}" for n in range(5))
        )
    return place


def test_a_gateway_says_at_start_what_prompts_become_that_it_read_anyway(
    place, pool_of, engine, tmp_path, caplog
):
    prompts = without_statistics(tmp_path / "prompts", pool_of("llama"))
    with gateway(place, engine, router=AUTO) as client:
        client.get("/v1/models")
    assert "example prompts" not in caplog.text  # statistics came with the experts
    with gateway(prompts, engine, router=AUTO, ready=False) as client:
        until(lambda: "example prompts" in caplog.text)
        summary = asked_to_check(client)["summary"]
    assert f"goose: {summary} (its page tells more)" in caplog.messages


def test_our_own_server_says_it_too_of_adapters_that_it_read(pool_of, tmp_path, caplog):
    prompts = without_statistics(tmp_path / "experts", pool_of("llama"))
    for expert in pool_of("llama").experts:
        brought = (prompts / expert.name / LAYOUT.prompts).read_text()
        bare = expert.with_statistics(prompt_statistics={}, reader=None, prompts_read=None)
        bare.save(tmp_path / "read" / expert.name)
        (tmp_path / "read" / expert.name / LAYOUT.prompts).write_text(brought)
    with own(tmp_path / "read"):
        until(lambda: "20 example prompts stay" in caplog.text)


def test_corrections_are_kept_and_later_choices_know_of_them(pool_of, engine, tmp_path):
    prompt = f"{TOPICS[0]} of the northern orchards"
    wrong = {"model": "goose", "expert": "e9", "prompt": prompt}
    right = {**wrong, "expert": "e3"}

    def scores(client):
        (choice,) = ask(client, path=ROUTE, model="goose", prompt=prompt)["choices"]
        return choice["scores"]

    for name, opened in (("own", own), ("gateway", gateway)):
        place = taught_in(tmp_path / name, pool_of("llama"))
        where = (place, engine) if name == "gateway" else (place,)
        with opened(*where, router=AUTO) as client:
            error = error_of(client, 403, CORRECTIONS, **right)
            assert error["message"].endswith("wasn't started with --learn.")
        with opened(*where, Serving(learn=True), router=AUTO) as client:
            client.app.state.service.looking = 0.05
            assert error_of(client, path=CORRECTIONS, **wrong)["param"] == "expert"
            assert error_of(client, path=CORRECTIONS, **{**right, "prompt": " "})["param"]
            assert scores(client)["e0"] == max(scores(client).values())
            before = scores(client)["e3"]
            assert ask(client, path=CORRECTIONS, **right) == {"object": "correction", **right}
            while scores(client)["e3"] <= before:
                time.sleep(0.05)  # the test ends in ten minutes
        assert corrections_in(place) == [Correction("e3", prompt)]


def test_keys_hold_and_see_their_experts_alone(place, engine):
    keys = ["all", "some=e0+e1"]
    for server in (own(place, api_keys=keys), gateway(place, engine, router=AUTO, api_keys=keys)):
        with server as client:
            assert client.post(ROUTE, json={}).status_code == 401
            client.headers["Authorization"] = "Bearer some"
            (choice,) = ask(client, path=ROUTE, model="goose", prompt=TOPICS[3])["choices"]
            assert choice["scores"].keys() == {"e0", "e1", "base"}
            reply = client.post(PATH, json={"model": "goose", "prompt": TOPICS[3], "max_tokens": 1})
            assert reply.headers[EXPERTS] == told({"choices": [choice]})


def test_a_gateway_chooses_while_its_engine_is_away(place):
    with engine_of() as engine:
        pass
    with gateway(place, engine, router=AUTO, ready=False) as client:
        assert (
            ask(client, path=ROUTE, model="auto", prompt=TOPICS[3])["choices"][0]["expert"] == "e3"
        )


@needs_fork
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_gateway_chooses_on_each_of_its_threads(place, engine):
    # In a process of its own: once OpenMP had two threads here, later forks would hang.
    assert forked(lambda: two_choose_at_once(place, engine)) == 0


def two_choose_at_once(place, engine):
    torch.set_num_threads(2)
    with gateway(place, engine, router=AUTO) as client, ThreadPoolExecutor(2) as senders:
        chooser = client.app.state.service.models["goose"].runner.chooser
        choose, together = chooser.choose, threading.Barrier(2)

        def when_two_are(*given, **known):
            together.wait(60)
            assert torch.get_num_threads() == 1
            return choose(*given, **known)

        chooser.choose = when_two_are

        def expert_of(prompt):
            return ask(client, path=ROUTE, model="goose", prompt=prompt)["choices"][0]["expert"]

        assert list(senders.map(expert_of, TOPICS[:2])) == ["e0", "e1"]


def test_in_the_shadow_requests_are_answered_as_they_ask(place, engine, caplog):
    caplog.set_level("INFO", "phatgoose")
    shadow = Serving(shadow=True)
    for server in (own(place, shadow), gateway(place, engine, shadow, router=AUTO)):
        caplog.clear()
        with server as client:
            chat = [{"role": "user", "content": TOPICS[2]}, {"role": "user", "content": FOLLOW_UP}]
            plain = client.post(CHATS, json={"model": "goose", "messages": chat, "max_tokens": 2})
            assert (plain.headers[EXPERTS], plain.headers[SHADOW]) == ("base=1", "e2=1")
            two = {"model": "goose:e1", "prompt": [TOPICS[0], "Thank you!"], "max_tokens": 2}
            named = client.post(PATH, json=two)
            assert (named.headers[EXPERTS], named.headers[SHADOW]) == ("e1=1; e1=1", "e0=1; base=1")
            lines = [line for line in caplog.messages if line.startswith("shadow:")]
            assert len(lines) == 3
            assert "goose would go to e2=1, +" in lines[0]
            counts = counts_of(client)
            assert counts['phatgoose_chosen_total{expert="e2",model="goose"}'] == 1
            assert counts['phatgoose_base_answers_total{model="goose"}'] == 1
            weights = {"model": "goose", "prompt": TOPICS[0], "weights": {"e3": 1}, "max_tokens": 2}
            assert client.post(PATH, json=weights).headers[EXPERTS] == "e3=1"
            assert (
                ask(client, path=ROUTE, model="goose", prompt=TOPICS[3])["choices"][0]["expert"]
                == "e3"
            )


def test_in_the_shadow_the_base_answers_as_it_does_alone(place, pool_of):
    body = {"model": "goose", "prompt": TOPICS[2], "max_tokens": 6, "temperature": 0}
    with own(place, Serving(shadow=True)) as client:
        told = ask(client, **body, routing=True)["choices"][0]
    base = [ServedModel("goose", pool_of("llama").base.id, dtype="float32")]
    with client_of(create_app(base, Serving(shadow=True))) as client:
        reply = client.post(PATH, json=body)
        assert SHADOW not in reply.headers
    assert told["text"] == reply.json()["choices"][0]["text"]
    assert told["routing"]["summary"] == {"base": 1.0}


def test_a_choice_that_fails_harms_no_answer_in_the_shadow(place):
    def fail(*_):
        raise RoutingError("no")

    reads = small_reader()._stack.module.register_forward_pre_hook(fail)
    with own(place, Serving(shadow=True)) as client, reads:
        reply = client.post(PATH, json={"model": "goose", "prompt": "hi", "max_tokens": 2})
        assert reply.status_code == 200
        assert SHADOW not in reply.headers


def test_a_shadow_needs_a_router_by_prompt(place):
    server = own(place, Serving(shadow=True), router="arrow")
    with pytest.raises(ConfigError, match="--shadow needs routers that choose for a prompt"):
        server.__enter__()


def test_the_trace_of_a_request_goes_to_the_engine(place):
    with engine_of() as engine, gateway(place, engine, router=AUTO) as client:
        for headers in (TRACE, {}, {**TRACE, "tracestate": b"\xe9"}):
            body = {"model": "goose", "prompt": TOPICS[0], "max_tokens": 2}
            assert client.post(PATH, json=body, headers=headers).status_code == 200
        got = [{name: sent.get(name) for name in TRACE} for sent in engine.headers]
        without = dict.fromkeys(TRACE)
        assert got == [TRACE, without, {**TRACE, "tracestate": None}]
