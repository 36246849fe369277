"""OpenAI's Responses API: bodies become chats, and answers are of openai's own types."""

import json

import pytest
from pydantic import TypeAdapter, create_model

import serving
from fake_engine import engine_of, gateway
from phatgoose.apps.server.local import json_form
from phatgoose.config import Serving
from serving import CHAT_TEMPLATE, CHATS, ask, counts_of, error_of

openai = pytest.importorskip("openai", "3.50", reason="needs the package openai")

PATH, KEEPS_NOTHING = "/v1/responses", "This server keeps nothing: send the whole conversation"
BODY = {"model": "goose", "input": "hi", "max_output_tokens": 5, "temperature": 0}
WEATHER = {"name": "weather", "parameters": {"type": "object"}, "strict": True}
SCHEMA = {"type": "object", "properties": {"city": {"const": "Bonn"}}, "required": ["city"]}
SCHEMA["additionalProperties"] = False
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
CALLED = {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": "{}"}
SAID = {"type": "output_text", "text": "well", "annotations": [], "logprobs": []}

pytestmark = pytest.mark.usefixtures("embedder_for_all")


@pytest.fixture(scope="module")
def here(client_with):
    return client_with(Serving(max_tokens=200), template=CHAT_TEMPLATE)


@pytest.fixture(scope="module")
def far(place, embedder_for_all):
    """A client of a gateway to `far.engine`."""
    with engine_of() as engine, gateway(place, engine) as client:
        client.engine = engine
        yield client


@pytest.fixture(params=["here", "far"])
def client(request):
    return request.getfixturevalue(request.param)


def responded(client, **body):
    """The response, which has openai's form."""
    reply = ask(client, path=PATH, **{**BODY, **body})
    openai.types.responses.Response.model_validate(reply, strict=True)
    return reply


def events_of(client, **body):
    """A stream's events in openai's form, and their kinds."""
    text = client.post(PATH, json={**BODY, **body, "stream": True}).text
    named = [each.split("\ndata: ") for each in text.removesuffix("data: [DONE]\n\n").split("\n\n")]
    events, form = [json.loads(each[1]) for each in named[:-1]], openai.types.responses
    assert [f"event: {each['type']}" for each in events] == [each[0] for each in named[:-1]]
    assert [each["sequence_number"] for each in events] == list(range(len(events)))
    assert TypeAdapter(list[form.ResponseStreamEvent]).validate_python(events, strict=True)
    return events, [each["type"].removeprefix("response.") for each in events]


def test_a_response_is_the_answer_of_the_chat(client):
    wanted = ask(client, path=CHATS, **serving.CHAT, temperature=0)
    reply = responded(client, metadata={"a": "b"}, client_metadata={"a": "b"})  # Codex's
    (choice,) = wanted["choices"]
    (item,), is_cut = reply["output"], choice["finish_reason"] == "length"
    assert item["content"] == [{**SAID, "text": choice["message"]["content"]}]
    assert reply["status"] == item["status"] == ("incomplete" if is_cut else "completed")
    assert reply["incomplete_details"] == ({"reason": "max_output_tokens"} if is_cut else None)
    used = [wanted["usage"][f"{name}_tokens"] for name in ("prompt", "completion", "total")]
    assert [reply["usage"][f"{name}_tokens"] for name in ("input", "output", "total")] == used
    assert {**reply, "metadata": {"a": "b"}, "max_output_tokens": 5, "store": False} == reply


def test_a_stream_makes_the_whole_response(client):
    body = {"weights": {"e1": 1}, "routing": True}
    (item,), (events, kinds) = responded(client, **body)["output"], events_of(client, **body)
    begun = ["created", "in_progress", "output_item.added", "content_part.added"]
    done = ["output_text.done", "content_part.done", "output_item.done", "incomplete"]
    assert kinds == [*begun, *["output_text.delta"] * (len(kinds) - 8), *done]
    text = "".join(each["delta"] for each in events if "delta" in each)
    assert text == item["content"][0]["text"] == events[-3]["part"]["text"]
    last = events[-1]["response"]
    assert last["output"] == [{**item, "status": "incomplete", "id": events[-2]["item"]["id"]}]
    assert last["routing"]["summary"] == {"e1": 1.0}


def test_items_and_settings_become_a_chat_s(far):
    asked, heard = {"type": "input_text", "text": "so"}, {"type": "reasoning", "content": None}
    said = {"type": "message", "id": "m", "role": "assistant", "content": [SAID]}
    output = {"type": "function_call_output", "call_id": "c1"}
    talk = [{"role": "user", "content": [asked]}, heard, said, {**CALLED, "id": "f"}, heard, CALLED]
    talk += [{**output, "output": "rain"}, CALLED, {**output, "output": [asked]}]
    form = {"name": "it", "schema": {"type": "object"}}
    text = {"format": {"type": "json_schema", **form}, "verbosity": "low"}
    sent = {"input": talk, "instructions": "brief", "text": text, "reasoning": {"effort": "low"}}
    tools = [
        {"type": "custom", "name": "x"},
        {"type": "function", **WEATHER},
        {"type": "web_search"},
    ]
    sent |= {"tools": tools, "store": False, "background": False, "previous_response_id": None}
    sent |= {"truncation": "auto", "include": ["reasoning.encrypted_content"], "stop": ["x"]}
    responded(far, **sent, tool_choice={"type": "function", "name": "weather"})
    wanted = {"stop": ["x"], "max_tokens": 5, "reasoning_effort": "low"}
    wanted |= {"tools": [{"type": "function", "function": WEATHER}]}
    wanted |= {"tool_choice": {"type": "function", "function": {"name": "weather"}}}
    wanted |= {"response_format": {"type": "json_schema", "json_schema": form}}
    talk = [("system", "brief"), ("user", "so"), ("assistant", "well"), ("tool", "rain")]
    talk += [("assistant", None), ("tool", "so")]
    more = [{}, {}, {"tool_calls": [CALL, CALL]}, {"tool_call_id": "c1"}, {"tool_calls": [CALL]}]
    pairs = zip(talk, [*more, more[3]], strict=True)
    wanted["messages"] = [{"role": who, "content": what, **each} for (who, what), each in pairs]
    responded(
        far, tools=tools[::2], tool_choice="auto", text={"format": {"type": "text"}}, reasoning=None
    )
    told, plain = far.engine.requests[-2:]
    assert plain.pop("response_format") == {"type": "text"}
    assert {**told, **wanted} == told
    assert not (told.keys() & sent.keys()) - {"tools", "stop", "truncation"}
    assert not plain.keys() & {*wanted} - {"messages", "max_tokens"}


@pytest.mark.parametrize("stream", [False, True])
def test_calls_are_items_and_failures_the_last_event(far, stream):
    news = {"name": "news", "arguments": "[]"}
    said = {"tool_calls": [{**CALL, "index": 0}, {**CALL, "index": 1, "function": news}]}
    choice = {"delta": said} if stream else {"message": said, "finish_reason": "tool_calls"}
    far.engine.mode, far.engine.content = "odd", json.dumps({"choices": [choice]}).encode()
    if stream:
        events, kinds = events_of(far)
        assert kinds[2:4] == ["output_item.added", "function_call_arguments.delta"]
        done = [each for each in events if each["type"].endswith("arguments.done")]
        assert [(each["name"], each["arguments"]) for each in done] == [
            ("weather", "{}"),
            ("news", "[]"),
        ]
    first, second, *_ = (events[-1]["response"] if stream else responded(far))["output"]
    assert {**first, **CALLED} == first
    assert {**second, **CALLED, **news} == second
    far.engine.mode = "unfinished"
    (*_, last), _ = events_of(far)
    far.engine.mode = "well"
    assert last["type"] == "response.failed"
    assert last["response"]["error"]["message"] == "The engine broke off its answer."


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"store": True}, f"store: {KEEPS_NOTHING}"),
        ({"input": [{"type": "item_reference", "id": "m"}]}, KEEPS_NOTHING),
        ({"input": ["message"]}, "is no message or function_call"),
        ({"input": []}, "input: List should have at least 1 item"),
        ({"input": "x" * 99_000}, "the model can hold"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "content.0.type"),
        ({"input": [{"role": "x"}], "instructions": "brief"}, "input.0.role: Input"),
        ({"instructions": 5}, "instructions: Input should be a valid string"),
        ({"max_output_tokens": 0}, "max_output_tokens: Input should be greater"),
        ({"text": {"format": {"type": "xml"}}}, "text.type: Input should be 'text'"),
        ({"text": 5}, "text: Input should be a valid dictionary"),
        ({"include": ["message.output_text.logprobs"]}, "include.0: Input should be"),
        ({"n": 2}, "n: Input should be 1"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_wrong_is_named_as_it_was_sent(client, change, said):
    error = error_of(client, path=PATH, **{**BODY, **change})
    assert said in error["message"]
    assert error["param"] == next(iter(change))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"input": [{"role": "user", "content": [{**SAID, "a": 1}]}]}, "input.0.content.0.a: only"),
        ({"text": {"format": {"type": "json_schema", "schema": {"type": "odd"}}}}, "can't keep"),
    ],
)
def test_what_this_server_cannot_do_is_named_as_it_was_sent(here, change, said):
    error = error_of(here, path=PATH, **{**BODY, **change})
    assert said in error["message"]
    assert error["param"] == next(iter(change))


def test_other_paths_say_what_there_is_and_this_one_is_counted(here):
    for path in ("/v1/embeddings", "/tokenize", "/v1/messages", f"{PATH}/resp_1"):
        assert f", {PATH}; answers aren't kept" in error_of(here, 404, path)["message"]
    responded(here)
    assert counts_of(here)[f'phatgoose_requests_total{{path="{PATH}",status="200"}}']


def test_openai_s_client_reads_all_of_it(client):
    fields, form = {**BODY, "max_output_tokens": 60}, create_model("Bird", kind=(str, ...))
    with openai.OpenAI(base_url="http://localhost/v1", api_key="x", http_client=client) as ours:
        text = ours.responses.create(**fields).output_text
        with ours.responses.stream(**fields) as stream:
            assert "".join(each.delta for each in stream if "text.delta" in each.type) == text
        if not hasattr(client, "engine") and json_form.LLMatcher is not None:
            assert ours.responses.parse(**fields, text_format=form).output_parsed.kind is not None
            fields |= {"tools": [{"type": "function", **WEATHER, "parameters": SCHEMA}]}
            (call,) = ours.responses.create(**fields, tool_choice="required").output
            assert json.loads(call.arguments) == {"city": "Bonn"}
            said = {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}
            fields["input"] = [{"role": "user", "content": "hi"}, call, said]
            assert ours.responses.create(**fields).usage.input_tokens > 60
