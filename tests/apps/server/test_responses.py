"""OpenAI's Responses API: bodies become chats, and answers are of openai's own types."""

import json

import pytest
from pydantic import BaseModel, TypeAdapter

import serving
from fake_engine import engine_of, gateway
from phatgoose.apps.server.local import json_form
from phatgoose.config import Serving
from serving import CHAT_TEMPLATE, CHATS, ask, counts_of, error_of

openai = pytest.importorskip("openai", "3.50", reason="needs the package openai")

PATH = "/v1/responses"
BODY = {"model": "goose", "input": "hi", "max_output_tokens": 5, "temperature": 0}
WEATHER = {"name": "weather", "parameters": {"type": "object"}, "strict": True}
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
CALLED = {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": "{}"}
SAID = {"type": "output_text", "text": "well", "annotations": [], "logprobs": []}
NOTHING = "This server keeps nothing: send the whole conversation as input"

pytestmark = pytest.mark.usefixtures("embedder_for_all")


@pytest.fixture(scope="module")
def here(client_with):
    return client_with(Serving(max_tokens=200), template=CHAT_TEMPLATE)


@pytest.fixture(scope="module")
def before_engine(place, embedder_for_all):
    """A client of a gateway to `client.engine`."""
    with engine_of() as engine, gateway(place, engine, template=CHAT_TEMPLATE) as client:
        client.engine = engine
        yield client


@pytest.fixture(params=["here", "before_engine"])
def client(request):
    return request.getfixturevalue(request.param)


def responded(client, **body):
    """The response, which has openai's form."""
    reply = ask(client, path=PATH, **{**BODY, **body})
    openai.types.responses.Response.model_validate(reply, strict=True)
    return reply


def events_of(client, **body):
    """A stream's events, each in openai's form, numbered, and named by its first line."""
    text = client.post(PATH, json={**BODY, **body, "stream": True}).text
    named = [each.split("\ndata: ") for each in text.removesuffix("data: [DONE]\n\n").split("\n\n")]
    events, form = [json.loads(each[1]) for each in named[:-1]], openai.types.responses
    assert [f"event: {each['type']}" for each in events] == [each[0] for each in named[:-1]]
    assert [each["sequence_number"] for each in events] == list(range(len(events)))
    assert TypeAdapter(list[form.ResponseStreamEvent]).validate_python(events, strict=True)
    return events


def test_a_response_is_the_answer_of_the_chat(client):
    wanted = ask(client, path=CHATS, **serving.CHAT, temperature=0)
    reply, (choice,) = responded(client, metadata={"a": "b"}), wanted["choices"]
    (item,) = reply["output"]
    assert item["content"] == [{**SAID, "text": choice["message"]["content"]}]
    is_cut = choice["finish_reason"] == "length"
    assert reply["status"] == item["status"] == ("incomplete" if is_cut else "completed")
    assert reply["incomplete_details"] == ({"reason": "max_output_tokens"} if is_cut else None)
    used = [wanted["usage"][f"{name}_tokens"] for name in ("prompt", "completion", "total")]
    assert [reply["usage"][f"{name}_tokens"] for name in ("input", "output", "total")] == used
    assert {**reply, "metadata": {"a": "b"}, "max_output_tokens": 5, "store": False} == reply


def test_a_stream_makes_the_whole_response(client):
    body = {"weights": {"e1": 1}, "routing": True}
    (item,), events = responded(client, **body)["output"], events_of(client, **body)
    kinds = [each["type"].removeprefix("response.") for each in events]
    begun = ["created", "in_progress", "output_item.added", "content_part.added"]
    done = ["output_text.done", "content_part.done", "output_item.done", "incomplete"]
    assert kinds == [*begun, *["output_text.delta"] * (len(kinds) - 8), *done]
    deltas = [each["delta"] for each in events if "delta" in each]
    assert "".join(deltas) == item["content"][0]["text"] == events[-3]["part"]["text"]
    last = events[-1]["response"]
    assert last["output"] == [{**item, "status": "incomplete", "id": events[-2]["item"]["id"]}]
    assert last["routing"]["summary"] == {"e1": 1.0}
    assert {each["response"]["id"] for each in events if "response" in each} == {last["id"]}


def test_items_and_settings_become_a_chat_s(before_engine):
    asked, heard = {"type": "input_text", "text": "so"}, {"type": "reasoning", "content": None}
    said = {"type": "message", "id": "m", "role": "assistant", "content": [SAID]}
    output = {"type": "function_call_output", "call_id": "c1"}
    talk = [{"role": "user", "content": [asked]}, heard, said, {**CALLED, "id": "f"}, heard, CALLED]
    talk += [{**output, "output": "rain"}, CALLED, {**output, "output": [asked]}]
    format_ = {"name": "it", "schema": {"type": "object"}}
    text = {"format": {"type": "json_schema", **format_}, "verbosity": "low"}
    sent = {"input": talk, "instructions": "brief", "text": text, "reasoning": {"effort": "low"}}
    sent |= {"tools": [{"type": "function", **WEATHER}], "parallel_tool_calls": False}
    sent |= {"store": False, "background": False, "previous_response_id": None, "user": "me"}
    sent |= {"truncation": "auto", "include": ["reasoning.encrypted_content"], "stop": ["x"]}
    responded(before_engine, **sent, tool_choice={"type": "function", "name": "weather"})
    result = {"role": "tool", "tool_call_id": "c1"}
    wanted = {
        "stop": ["x"],
        "max_tokens": 5,
        "reasoning_effort": "low",
        "parallel_tool_calls": False,
    }
    wanted |= {"tools": [{"type": "function", "function": WEATHER}]}
    wanted |= {"tool_choice": {"type": "function", "function": {"name": "weather"}}}
    wanted |= {"response_format": {"type": "json_schema", "json_schema": format_}}
    wanted["messages"] = [
        {"role": "system", "content": "brief"},
        {"role": "user", "content": "so"},
        {"role": "assistant", "content": "well", "tool_calls": [CALL, CALL]},
        {**result, "content": "rain"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {**result, "content": "so"},
    ]
    told = before_engine.engine.requests[-1]
    assert {**told, **wanted} == told
    assert not told.keys() & {"input", "text", "reasoning", "instructions", "include", "store"}


@pytest.mark.parametrize("stream", [False, True])
def test_calls_are_items(before_engine, stream):
    news = {"name": "news", "arguments": "[]"}
    said = {"tool_calls": [{**CALL, "index": 0}, {**CALL, "index": 1, "function": news}]}
    choice = {"delta": said} if stream else {"message": said, "finish_reason": "tool_calls"}
    content = json.dumps({"choices": [choice]}).encode()
    before_engine.engine.mode, before_engine.engine.content = "odd", content
    reply = events_of(before_engine) if stream else responded(before_engine)
    before_engine.engine.mode = "well"
    first, second, *_ = reply[-1]["response"]["output"] if stream else reply["output"]
    assert {**first, **CALLED} == first
    assert {**second, **CALLED, **news} == second
    kinds = [each["type"].removeprefix("response.") for each in reply] if stream else []
    assert kinds[2:4] == ["output_item.added", "function_call_arguments.delta"] * stream


def test_a_stream_that_breaks_off_ends_with_the_failure(before_engine):
    before_engine.engine.mode = "unfinished"
    last = events_of(before_engine)[-1]
    before_engine.engine.mode = "well"
    assert last["type"] == "response.failed"
    assert last["response"]["error"]["message"] == "The engine broke off its answer."


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"store": True}, f"store: {NOTHING}"),
        ({"conversation": {"id": "c"}}, NOTHING),
        ({"input": [{"type": "item_reference", "id": "m"}]}, NOTHING),
        ({"input": [5]}, "'[5]' is no message"),
        ({"input": {}}, "input: Input should be a valid list"),
        ({"input": []}, "input: List should have at least 1 item"),
        ({"input": None}, "input: Field required"),
        ({"input": [{"role": "cook", "content": ""}]}, "input.0.role: Input should be 'system'"),
        ({"input": "x" * 3000}, "the model can hold"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "content.0.type"),
        ({"input": [{"role": "user", "content": [[[]]]}]}, "input.0.content.0: Input should be"),
        ({"max_output_tokens": 0}, "max_output_tokens: Input should be greater"),
        ({"text": {"format": {"type": "xml"}}}, "text.type: Input should be 'text'"),
        ({"text": 5}, "text: Input should be a valid dictionary"),
        ({"reasoning": {"effort": "odd"}}, "reasoning: Input should be 'none'"),
        ({"include": ["message.output_text.logprobs"]}, "include.0: Input should be"),
        ({"n": 2}, "n: Input should be 1"),
        ({"weights": {"e9": 1}}, "no expert 'e9'"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_wrong_is_named_as_it_was_sent(client, change, said):
    error = error_of(client, path=PATH, **{**BODY, **change})
    assert said in error["message"]
    assert error["param"] == next(iter(change))


def test_other_paths_say_what_there_is_and_this_one_is_counted(here):
    for path in ("/v1/embeddings", "/tokenize", "/v1/messages", f"{PATH}/resp_1"):
        assert f", {PATH}; answers aren't kept" in error_of(here, 404, path)["message"]
    counted = f'phatgoose_requests_total{{path="{PATH}",status="200"}}'
    before = counts_of(here).get(counted, 0)
    responded(here)
    assert counts_of(here)[counted] == before + 1


class Bird(BaseModel):
    kind: str


def test_openai_s_client_reads_all_of_it(client):
    fields = {**BODY, "max_output_tokens": 60}
    with openai.OpenAI(base_url="http://localhost/v1", api_key="x", http_client=client) as ours:
        text = ours.responses.create(**fields).output_text
        with ours.responses.stream(**fields) as stream:
            assert "".join(each.delta for each in stream if "text.delta" in each.type) == text
        if not hasattr(client, "engine") and json_form.LLMatcher is not None:
            assert ours.responses.parse(**fields, text_format=Bird).output_parsed.kind is not None
