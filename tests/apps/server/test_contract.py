"""The protocol, which models here and engines behind a gateway keep alike."""

import itertools
import json
import shutil
from contextlib import ExitStack, closing, contextmanager
from http.client import HTTPConnection

import pytest

import serving
from fake_engine import engine_of, gateway, hurry, numbered
from phatgoose.apps.server import ServedModel, create_app
from phatgoose.config import Routing, Serving
from phatgoose.experts.pool import Pool
from serving import (
    CHAT_TEMPLATE,
    CHATS,
    GREEDY,
    JSON,
    PATH,
    ask,
    chunks_of,
    counts_of,
    error_of,
    health_of,
    text_of,
    until,
)
from topic_prompts import PROMPTS

LIMITS = Serving(max_tokens=200)
LONG = {**GREEDY, "max_tokens": 490, "keep": ["e1", "e2"]}
MIXED = {**GREEDY, "prompt": ["to be or not", "who?"], "n": 2, "temperature": 1.2, "seed": 3}
PICTURE = [{"type": "image_url", "text": ""}]
TALK = [{"role": "developer", "content": "be"}, {"role": "user", "content": "hi"}]
CHAT = {"model": "goose", "messages": TALK, "max_tokens": 5, "temperature": 0}

pytestmark = pytest.mark.usefixtures("embedder_for_all")


@pytest.fixture(scope="module", params=["here", "vllm", "llama.cpp"])
def client(request, pool, place, embedder_for_all):
    """A client of one of the backends; `client.engine` is the stand-in for an engine, or None."""
    with ExitStack() as stack:
        if request.param == "here":
            app, engine = serving.app_of(pool, LIMITS, template=CHAT_TEMPLATE), None
            client = stack.enter_context(serving.client_of(app, raise_server_exceptions=False))
        else:
            engine = stack.enter_context(engine_of(request.param))
            opened = gateway(place, engine, LIMITS)
            client = stack.enter_context(opened)
        client.engine = engine
        yield client


@pytest.fixture(params=["here", "vllm"])
def far(request, pool, place):
    """A function from limits to a client under uvicorn; answers stay away in `client.hanging()`.

    They hang from the beginning if they are to be `late`, and else amid a stream.
    """

    @contextmanager
    def opened(**limits):
        limits = Serving(max_tokens=2000, **limits)
        if request.param == "here":
            app = serving.app_of(pool, limits, endless=True)
            engine = app.state.service.backend.engine
            with serving.far_client_of(app) as client:
                client.hanging = lambda late=False: serving.held(0 if late else 2)
                client.computing = lambda: [
                    row for b in engine.batches for row in b.sequences if not row.is_cancelled
                ]
                yield client
        else:
            with engine_of() as engine, gateway(place, engine, limits, listens=True) as client:
                client.hanging = lambda late=False: engine.hanging("slow" if late else "stalled")
                client.computing = lambda: health_of(client)["running"]
                yield client

    return opened


def joined(lists):
    return list(itertools.chain.from_iterable(lists))


def test_a_completion_has_openais_form(client):
    reply = ask(client, **MIXED)
    named = (reply["object"], reply["id"][:5], reply["model"])
    assert named == ("text_completion", "cmpl-", "goose")
    assert [choice["index"] for choice in reply["choices"]] == [0, 1, 2, 3]
    assert {choice["finish_reason"] for choice in reply["choices"]} <= {"stop", "length"}
    usage = reply["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["prompt_tokens"] == len("to be or not") + len("who?")  # a byte a token
    assert usage["completion_tokens"] >= 4


@pytest.mark.parametrize("logprobs", [None, 1])
def test_a_stream_makes_the_whole_completion(client, logprobs):
    if logprobs is not None and client.engine:
        assert error_of(client, **MIXED, logprobs=1)["param"] == "logprobs"
        return
    body = {**MIXED, "logprobs": logprobs}
    whole, chunks = ask(client, **body), chunks_of(client, **body)
    assert len({chunk["id"] for chunk in chunks}) == 1
    for choice in whole["choices"]:
        parts = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == choice["index"]]
        assert "".join(part["text"] for part in parts) == choice["text"]
        assert [part["finish_reason"] for part in parts[:-1]] == [None] * (len(parts) - 1)
        assert parts[-1]["finish_reason"] in ("stop", "length")
        for name, told in (choice["logprobs"] or {}).items():
            assert joined(part["logprobs"][name] for part in parts) == told
            assert len(told) == len(choice["logprobs"]["tokens"])
        assert all(len(top) <= 2 for top in (choice["logprobs"] or {}).get("top_logprobs", ()))


def test_a_stream_of_a_chat_makes_the_whole_chat(client):
    body = {**CHAT, "logprobs": True, "top_logprobs": 1}
    reply = ask(client, path=CHATS, **body)
    (choice,) = reply["choices"]
    assert (reply["object"], reply["id"][:9]) == ("chat.completion", "chatcmpl-")
    assert choice["message"]["role"] == "assistant"
    options = {"stream_options": {"include_usage": True}}
    first, *chunks, last = chunks_of(client, CHATS, **body, **options)
    assert (last["choices"], last["usage"]) == ([], reply["usage"])
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    parts = [chunk["choices"][0] for chunk in chunks]
    text = "".join(part["delta"]["content"] for part in parts)
    assert text == choice["message"]["content"]
    told = joined(part["logprobs"]["content"] for part in parts if part["logprobs"])
    shown = [[each["token"] for each in rows] for rows in (told, choice["logprobs"]["content"])]
    assert shown[0] == shown[1]
    token = choice["logprobs"]["content"][0]
    assert [each["logprob"] for each in token["top_logprobs"]] == [token["logprob"]]
    assert token["bytes"] in (None, list(token["token"].encode()))  # None: a part of a character


def test_experts_are_named_alone_or_after_their_model_or_base(client):
    names = ("e2", "goose:e2", "e1")
    one, same, other = (text_of(client, **{**GREEDY, "model": name}) for name in names)
    assert one == same != other
    assert error_of(client, **{**GREEDY, "model": "e2", "k": 1})["param"] == "k"
    error = error_of(client, 404, **{**GREEDY, "model": "gose"})
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert error["message"].endswith("Did you mean 'goose'?")


def test_models_are_listed(client):
    cards = client.get("/v1/models").json()["data"]
    names, experts = [card["id"] for card in cards], ["e0", "e1", "e2", "e3"]
    assert names == (["auto", "goose", *experts] if client.engine else ["goose", "mean"])
    assert cards[1]["experts"] == experts
    assert client.get("/v1/models/goose").json() == cards[names.index("goose")]
    assert client.get("/v1/models/e1").json()["experts"] == ["e1"]
    assert client.get("/v1/models/duck").status_code == 404


@pytest.mark.parametrize("stream", [False, True])
def test_a_mixture_of_ones_own_and_who_answered(client, stream):
    body = {**GREEDY, "weights": {"e0": 0.25, "e2": 0.75, "e3": 0}, "routing": True}
    if client.engine and client.engine.kind != "llama.cpp":
        assert "can't mix" in error_of(client, **body)["message"]
        body["weights"] = {"e3": 1}
    shares = {name: weight for name, weight in body["weights"].items() if weight}
    shares = pytest.approx(shares, abs=0.01)
    replies = chunks_of(client, **body) if stream else [ask(client, **body)]
    reports = [reply["choices"][0]["routing"] for reply in replies]
    reports = [report for report in reports if report]
    assert (reports[-1]["summary"], reports[-1]["router"][:7]) == (shares, "weights")
    answer = [t for report in reports for t in report["tokens"] if t["part"] == "answer"]
    assert "".join(token["token"] for token in answer)
    assert all(token["experts"] in (shares, {}) for token in answer)
    error = error_of(client, **{**body, "weights": {"e00": 1}})
    assert error["param"] == "weights"
    assert error["message"].endswith("Did you mean 'e0'?")


@pytest.mark.parametrize(
    ("change", "param", "said"),
    [
        ({"max_tokens": "5"}, "max_tokens", "valid integer"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"frequency_penalty": 3}, "frequency_penalty", "less than or equal to 2"),
        ({"logit_bias": {"a": 1}}, "logit_bias", "should match pattern"),
        ({"logit_bias": {"5": -101}}, "logit_bias", "greater than or equal to -100"),
        ({"messages": [{"role": "user", "content": None}]}, "messages", "may be null"),
        ({"n": 33, "prompt": ["a", "b"]}, None, "Prompts times n may be 64 answers"),
        ({"prompt": [5000]}, "prompt", "prompt.0: Input should be a valid string"),
        ({"prompt": "x" * 99_000}, "prompt", "the model can hold"),
        ({"response_format": {"type": "xml"}}, "response_format", "type: Input should be 'text'"),
        ({"keep": ["e9"]}, "keep", "no expert 'e9'"),
        ({"leave_out": ["e0", "e1", "e2", "e3"]}, "leave_out", "No expert is left"),
        ({"router": "oracle"}, "router", "router: Input should be one of auto"),
        ({"router": "arow"}, "router", "Did you mean 'arrow'?"),
        ({"router": "auto:k=2"}, "router", "router is 'auto:k=2'"),
        ({"weights": {"e0": 1}, "k": 2}, None, "exclude each other"),
        ({"messages": [{"role": "user", "content": PICTURE}]}, "messages", "content.0.type: Input"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_wrong_is_named(client, place, pool, change, param, said):
    path, body = (CHATS, CHAT) if "messages" in change else (PATH, GREEDY)
    error = error_of(client, path=path, **{**body, **change})
    assert said in error["message"]
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert str(serving.folder_of(pool)) not in error["message"]
    assert str(place) not in error["message"]


def test_a_prompt_beyond_the_context_and_a_chat_of_odd_turns_are_for_the_model_to_refuse(client):
    errors = [error_of(client, **{**GREEDY, "prompt": "x" * 3000})]
    if client.engine:
        ask(client, path=CHATS, **{**CHAT, "messages": TALK[::-1]})
        sent = client.engine.requests[-1]["messages"]
        assert [each["role"] for each in sent] == ["user", "system"]
        assert "The engine refuses the request: 3000 tokens" in errors[0]["message"]
    else:
        errors += [error_of(client, path=CHATS, **{**CHAT, "messages": TALK[::-1]})]
        assert "The prompt has 3000 tokens; the model can hold" in errors[0]["message"]
        assert "The system speaks first." in errors[1]["message"]
        assert [each["param"] for each in errors] == ["prompt", "messages"]
    assert {each["type"] for each in errors} == {"invalid_request_error"}


TOOL = {"type": "function", "function": {"name": "weather"}}
IDLE = {"store": False, "service_tier": "flex", "metadata": {"a": "b"}, "user": "me", "top_k": -1}
IDLE |= {"min_p": 0, "repetition_penalty": 1.0, "frequency_penalty": 0, "presence_penalty": 0}
IDLE |= {"logit_bias": {}, "parallel_tool_calls": True, "stop": None, "mirostat": None, "n": None}
IDLE |= {"modalities": ["text"], "verbosity": "low", "prediction": {"type": "content"}}
IDLE |= {"prompt_cache_retention": "24h", "continue_final_message": False}


def test_what_asks_for_nothing_is_accepted(client):
    idle = {**IDLE, "best_of": 1, "echo": False, "suffix": "", "logprobs": None}
    assert text_of(client, **GREEDY, **idle) == text_of(client, **GREEDY)
    cached = {"type": "text", "text": "hi", "cache_control": {"type": "ephemeral"}}
    said = {"role": "assistant", "content": None, "tool_calls": [], "reasoning_content": "Hm."}
    said["refusal"] = None
    messages = [*TALK, said, {"role": "user", "content": [cached]}]
    plain = [*TALK, {"role": "assistant", "content": ""}, TALK[1]]
    answers = [
        ask(client, path=CHATS, **{**CHAT, "messages": talk}, **wish)["choices"][0]["message"]
        for talk, wish in (
            (messages, {**IDLE, "tools": [TOOL], "tool_choice": "none"}),
            (messages, {"tools": [], "tool_choice": "auto", "reasoning_effort": "low"}),
            (messages, {"chat_template_kwargs": {"enable_thinking": False}}),
            (plain, {}),
        )
    ]
    assert answers == answers[:1] * 4


@pytest.mark.parametrize("stream", [False, True])
def test_more_tokens_than_the_limit_are_cut_and_a_header_says_so(client, stream):
    for asked, told in ((200, None), (201, "200"), (5000, "200"), (-1, None)):
        body = {**CHAT, "max_tokens": asked, "stream": stream}
        reply = client.post(CHATS, json=body)
        assert reply.status_code == 200
        assert reply.headers.get("x-phatgoose-max-tokens") == told
        assert not client.engine or client.engine.requests[-1]["max_tokens"] == 200
    prompt = "x" * (client.get("/v1/models/goose").json()["context"] - 20)
    reply = client.post(PATH, json={**GREEDY, "prompt": prompt, "max_tokens": 150})
    if client.engine:  # which alone can count the prompt
        assert client.engine.requests[-1]["max_tokens"] == 150
    else:
        assert reply.headers["x-phatgoose-max-tokens"] == "20"


def test_an_answer_keeps_to_its_form(client):
    schema = {"type": "object", "properties": {"kind": {"enum": ["bird"]}}, "required": ["kind"]}
    schema["additionalProperties"] = False
    format_ = {"type": "json_schema", "json_schema": {"name": "it", "schema": schema}}
    body = {**CHAT, "max_tokens": 40, "response_format": format_}
    if client.engine is None:
        pytest.importorskip("llguidance", reason="needs phatgoose[json]")
    message = ask(client, path=CHATS, **body)["choices"][0]["message"]
    if client.engine:
        assert client.engine.requests[-1]["response_format"] == format_
    else:
        assert json.loads(message["content"]) == {"kind": "bird"}
    ask(client, **GREEDY, response_format={"type": "text"})


def test_paths_beside_the_protocol_s_main_ones(client):
    assert client.get("/health").json() == health_of(client)
    assert health_of(client)["status"] == "ok"
    assert client.get("/nowhere").json()["error"]["type"] == "not_found_error"


def test_what_is_routed_by_may_be_a_text_of_the_requests_own(client):
    router = {"router": "discriminant:fallback=off"}

    def chosen(path, **body):
        return client.post(path, json=body).headers["x-phatgoose-experts"]

    by_prompt = {prompt: chosen(PATH, **GREEDY | router | {"prompt": prompt}) for prompt in PROMPTS}
    assert len(set(by_prompt.values())) > 1
    for prompt, experts in by_prompt.items():
        for path, body in ((PATH, GREEDY), (CHATS, CHAT)):
            assert chosen(path, **body, **router, route_by=prompt) == experts
    if client.engine:
        assert "route_by" not in client.engine.requests[-1]
    assert chosen(PATH, **GREEDY, **router, route_by="x" * 20_000)  # the base needn't hold it
    for change in ({"model": "goose:e1"}, {"weights": {"e1": 1}}):
        error = error_of(client, **{**GREEDY, "route_by": "x", **change})
        assert error["param"] == "route_by"


def test_an_answer_of_the_base_says_so(client):
    counted = 'phatgoose_base_answers_total{model="goose"}'
    before = counts_of(client).get(counted, 0)
    for weight, said in ((0, "base"), (1, "e1")):
        body = {**GREEDY, "weights": {"e1": weight}, "routing": True, "n": 2}
        reply = client.post(PATH, json=body)
        assert reply.headers["x-phatgoose-experts"] == f"{said}=1"
        assert [each["routing"]["summary"] for each in reply.json()["choices"]] == 2 * [{said: 1.0}]
        last = chunks_of(client, **body)[-1]
        assert last["choices"][0]["routing"]["summary"] == {said: 1.0}
    assert counts_of(client)[counted] == before + 4


def test_metrics_count_what_happened(client):
    until(lambda: counts_of(client)["phatgoose_running"] == 0)
    before = counts_of(client)
    used = ask(client, **GREEDY)["usage"]
    error_of(client, **{**GREEDY, "n": -1})
    after = counts_of(client)
    for name, more in (
        ('phatgoose_requests_total{path="/v1/completions",status="200"}', 1),
        ('phatgoose_requests_total{path="/v1/completions",status="400"}', 1),
        ('phatgoose_generated_tokens_total{model="goose"}', used["completion_tokens"]),
    ):
        assert after[name] == before.get(name, 0) + more
    until(lambda: counts_of(client)["phatgoose_running"] == 0)


def is_idle(client):
    """Nothing is computed, or it was given up, and no request needs a routing of its own."""
    routings = client.app.state.service.routings.cached.values()
    return not client.computing() and not any(each.requests for each in routings)


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_takes_too_long_is_ended(far, stream):
    with far(timeout=1) as client:
        with client.hanging():
            if stream:
                assert chunks_of(client, **LONG)[-1]["error"]["code"] == "timeout"
            else:
                assert error_of(client, 504, **LONG)["code"] == "timeout"
            until(lambda: is_idle(client))
        until(lambda: not health_of(client)["running"])


@pytest.mark.parametrize(("stream", "late"), [(False, False), (True, True), (True, False)])
def test_a_client_that_goes_away_frees_its_place(far, stream, late):
    with far() as client:
        with client.hanging(late):
            with closing(HTTPConnection("127.0.0.1", client.base_url.port, 60)) as leaving:
                leaving.request("POST", PATH, json.dumps({**LONG, "stream": stream}), JSON)
                until(lambda: health_of(client)["running"])
                if stream and not late:
                    with leaving.getresponse() as reply:
                        assert reply.readline().startswith(b"data: ")
            until(lambda: is_idle(client))
        until(lambda: not health_of(client)["running"])
        ask(client, **GREEDY)


@pytest.mark.parametrize("kind", ["here", "vllm"])
def test_a_watched_pool_takes_experts_in_and_gives_them_up(place, tmp_path, caplog, kind):
    for name in ("e0", "e1"):
        shutil.copytree(place / name, tmp_path / name)
        (tmp_path / f"round-{name}").symlink_to(tmp_path)
    config, weights = "e1/phatgoose.json", "adapter_model.safetensors"

    def is_trained_anew(name):
        before, after = (Pool.open(place)[each].info.adapter_sha256 for each in (name, "e2"))
        shutil.copyfile(place / "e2" / weights, tmp_path / name / weights)
        record = tmp_path / name / "phatgoose.json"
        record.write_text(record.read_text().replace(before, after))

    def has(*names):
        until(lambda: client.get("/v1/models/goose").json()["experts"] == list(names))

    def answers(expert):
        return text_of(client, **{**GREEDY, "model": f"goose:{expert}"})

    with ExitStack() as stack:
        engine = stack.enter_context(engine_of("vllm", numbered(("e0", "e1"))))
        if kind == "here":
            model = ServedModel("goose", str(tmp_path), Routing("phatgoose"), dtype="float32")
            opened = serving.client_of(create_app([model], Serving(watch=True)))
        else:
            opened = gateway(tmp_path, engine, Serving(watch=True))
        client = stack.enter_context(opened)
        hurry(client.app.state.service, again=600)
        (tmp_path / config).write_text("{")
        until(lambda: "goose has changed, and is served as it was" in caplog.text)
        assert answers("e1")
        shutil.copyfile(place / config, tmp_path / config)  # which is taken at once
        engine.mode = "loading slowly"
        shutil.copytree(place / "e2", tmp_path / "e2")
        if kind == "vllm":
            until(lambda: engine.loaded)
            assert answers("e1")  # meanwhile
            engine.go_on.set()
        has("e0", "e1", "e2")
        assert answers("e2")
        if kind == "here":
            body = {**GREEDY, "weights": {"e0": 0.6, "e1": 0.4}, "max_tokens": 8}
            wanted = text_of(client, **body)
            with serving.held(2) as go_on:
                running = serving.beside(text_of, client, **body)
                until(lambda: health_of(client)["running"])
                shutil.rmtree(tmp_path / "e0")
                has("e1", "e2")
                go_on.set()
                assert running.result() == wanted  # by the experts that it began with
            error_of(client, **body)
        else:
            hurry(client.app.state.service)
            engine.loads = False
            shutil.copytree(place / "e3", tmp_path / "e3")
            until(lambda: "lacks e3" in caplog.text)
            is_trained_anew("e3")
            engine.loads = True
            has("e0", "e1", "e2", "e3")
            is_trained_anew("e1")  # of which the engine has the old weights
            until(lambda: "Two experts are called 'e1'" in caplog.text)
            assert answers("e1")


def test_what_changed_while_models_were_loaded_is_served_and_factors_stay_shared(place, tmp_path):
    shutil.copytree(place / "e0", tmp_path / "e0")
    routings = {"goose": Routing("phatgoose"), "arrow": Routing("arrow")}
    models = [ServedModel(n, str(tmp_path), r, dtype="float32") for n, r in routings.items()]
    app = create_app(models, Serving(watch=True))
    hurry(app.state.service)
    shutil.copytree(place / "e1", tmp_path / "e1")
    with serving.client_of(app) as client:
        until(
            lambda: all("e1" in client.get(f"/v1/models/{n}").json()["experts"] for n in routings)
        )
        goose, arrow = (app.state.service.models[name].parts.layers for name in routings)
        assert all(goose[site].A is arrow[site].A for site in goose)
