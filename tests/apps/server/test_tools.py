"""Tools on our own server: what the template gets, and calls, found in answers or forced."""

import json
import re
import time
from contextlib import closing

import pytest
import torch

import serving
from phatgoose.apps.server.local import json_form
from phatgoose.apps.server.local.batches import ActiveSequence
from phatgoose.apps.server.local.json_form import Calls, form_of
from phatgoose.apps.server.local.runner import ModelRunner
from phatgoose.apps.server.protocol import ApiError, ChatRequest
from phatgoose.apps.server.replies import Progress
from phatgoose.apps.server.requests import Answer, Decoding, RequestPrompt, RequestReader
from phatgoose.base.loading import load_base
from phatgoose.config import Serving
from phatgoose.untrusted_text import UntrustedText
from routed_models import compose_by
from serving import CHAT, CHAT_TEMPLATE, CHATS, ask, chunks_of, error_of

needs_library = pytest.mark.skipif(json_form.LLMatcher is None, reason="needs phatgoose[json]")


def tool_of(name, parameters=None, **more):
    return {"type": "function", "function": {"name": name, "parameters": parameters, **more}}


CITY = {"$defs": {"C": {"enum": ["Bonn", "Köln"]}}, "properties": {"city": {"$ref": "#/$defs/C"}}}
CITY |= {"type": "object", "required": ["city"], "additionalProperties": False}
WEATHER, NAMED = tool_of("weather", CITY), {"type": "function", "function": {"name": "weather"}}
CLOCK = tool_of("clock", {"additionalProperties": False})
TEXT = '{"name": "weather", "arguments": {"city": "Köln"}}'
ONE, KOELN = f"<tool_call>\n{TEXT}\n</tool_call>", ("weather", {"city": "Köln"})
TWO = '[{"name": "weather", "arguments": {}}, {"name": "clock", "arguments": {"a": [1, {"b": 2}]}}]'
BOTH = [("weather", {}), ("clock", {"a": [1, {"b": 2}]})]
CALLED = {"name": "weather", "arguments": '{"city":"Köln"}'}
TURNS = [
    {"role": "user", "content": "plums"},
    {"role": "assistant", "content": None, "tool_calls": [{"id": "c1", "function": CALLED}]},
    {"role": "tool", "tool_call_id": "c1", "content": "rain"},
]
HERMES = (  # in Qwen's manner
    "{% if tools %}<tool_call>{% for t in tools %}{{ t | tojson }}{% endfor %}{% endif %}"
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% for c in m.tool_calls or () %}"
    "{{ c.function.name }} {{ c.function.arguments.city }}{% endfor %}{% endfor %}"
)
MISTRAL, GRANITE, LLAMA = "tools [TOOL_CALLS]", "tools <|tool_call|>", "tools"


def request_of(**wish):
    return ChatRequest(**{"model": "goose", "messages": TURNS, "tools": [WEATHER, CLOCK], **wish})


@pytest.fixture(scope="module")
def runner(pool):
    base = load_base(pool.base.id, dtype="float32")
    base.tokenizer.add_special_tokens({"additional_special_tokens": ["[TOOL_CALLS]"]})
    base.tokenizer.add_tokens(["<tool_call>", "</tool_call>"])
    return ModelRunner(compose_by("discriminant", pool, base), base.tokenizer)


def said_by(runner, text, template=HERMES, *, is_bound=False, most=300, schema=None, **wish):
    """(the text, functions called, how it ends) of an answer whose model wants to say `text`."""
    runner.tokenizer.chat_template = template
    if schema is not None:
        wish["response_format"] = {"type": "json_schema", "json_schema": {"schema": schema}}
    calls, events = Calls.of(request := request_of(**wish), runner), []
    answer = Answer(0, 0, RequestPrompt((5,), "", ()), Decoding(most, temperature=0))
    row = ActiveSequence(runner, answer, events.append)
    row.calls, row.form = calls, form_of(request, calls, runner) if is_bound else None
    tokens = [*runner.tokenizer(text)["input_ids"], *[*runner.ends] * most]
    while not row.is_over:
        logits = torch.zeros(runner.vocabulary)
        logits[tokens[len(row.generated)]] = 9
        row.advance(logits)
    deltas = events[-1].message.get("tool_calls", [])
    assert [each["index"] for each in deltas] == [*range(len(deltas))]
    assert len({each["id"] for each in deltas}) == len(deltas)
    functions = [each["function"] for each in deltas]
    said = [(each["name"], json.loads(each["arguments"])) for each in functions]
    return "".join(event.text for event in events), said, events[-1].finish


@pytest.mark.parametrize(
    ("template", "text", "left", "called"),
    [
        (HERMES, f"Let's see. \n{ONE}\n{ONE}\n", "Let's see.", [KOELN] * 2),
        (HERMES, f"{ONE}\nSo.", "\nSo.", [KOELN]),
        (HERMES, ONE.removesuffix("</tool_call>"), "", [KOELN]),
        (HERMES, f"{TEXT}\n{TEXT}", "", [KOELN] * 2),  # small models forget the mark
        (HERMES, '<tool_call>{"name": "clock"}</tool_call>', "", [("clock", {})]),
        (MISTRAL, f"Hm.[TOOL_CALLS]{TWO}", "Hm.", BOTH),
        (GRANITE, f"<|tool_call|> {TWO}", "", BOTH),
        (LLAMA, TEXT.replace("arguments", "parameters"), "", [KOELN]),
    ],
    ids=lambda value: str(value)[:30],
)
def test_calls_are_found_in_each_form(runner, template, text, left, called):
    assert said_by(runner, text, template) == (left, called, "tool_calls")
    first = said_by(runner, text, template, parallel_tool_calls=False)
    assert first == (left, called[:1], "tool_calls")


@pytest.mark.parametrize(
    "text",
    [
        "plain, with {braces} and <tool> ",
        *(ONE.replace("weather", each) for each in ("whether", '", "name": ["weather"], "a": "')),
        *(ONE.replace('{"city": "Köln"}', each) for each in ('"Köln"', "[1]", '{"a": NaN}')),
        ONE.replace("Köln", '"}{"a":' * 20),
        "<tool_call>" * 20 + ONE[:40],
        "<tool_call>[]</tool_call>\n<tool_c",
    ],
    ids=lambda value: value[:60],
)
def test_what_is_no_call_stays_text(runner, text):
    assert said_by(runner, text) == (text, [], "stop")


def test_a_mebibyte_of_marks_is_read_in_no_time(runner):
    calls, begun = Calls.of(request_of(tool_choice="required"), runner), time.perf_counter()
    for text in ("<tool_call>", "<tool_call></tool_call>", "</tool_call>{", '\n{"name"', " {", ONE):
        left = calls.parsed(Progress(0, text * ((1 << 20) // len(text)), finish="stop"))
        assert bool(left.text) == (text != ONE)
    assert time.perf_counter() - begun < 60


@needs_library
@pytest.mark.parametrize("template", [HERMES, MISTRAL, GRANITE, LLAMA, CHAT_TEMPLATE])
def test_an_answer_that_must_be_a_call_keeps_to_the_schema(runner, template):
    for choice, called in (("required", ("clock", {})), (NAMED, ("weather", {"city": "Bonn"}))):
        wish = {"tool_choice": choice, "is_bound": True}
        said = said_by(runner, "I'd say: [cl", template, **wish)
        assert said == ("", [called], "tool_calls")
    assert said_by(runner, ONE, template, most=30, **wish)[1:] == ([], "length")


@needs_library
def test_strict_calls_keep_to_the_schema_and_text_is_free(runner):
    wish = {"tools": [tool_of("weather", CITY, strict=True), CLOCK], "is_bound": True}
    assert said_by(runner, "Plain. {", **wish) == ("Plain. {", [], "stop")
    assert said_by(runner, f"Hm.{ONE}{ONE} So", **wish) == ("Hm. So", [KOELN] * 2, "tool_calls")
    changed = ONE.replace("Köln", "Rome").replace("city", "town")
    assert said_by(runner, changed, **wish)[1] == [("weather", {"city": "Bonn"})]
    assert said_by(runner, changed)[1] == [("weather", {"town": "Rome"})]
    wish = {"is_bound": True, "schema": {"const": "rain"}}  # of response_format
    assert said_by(runner, ONE, **wish)[1:] == ([KOELN], "tool_calls")
    assert said_by(runner, '"rai', **wish) == ('"rain"', [], "stop")


@needs_library
def test_a_schema_with_unknown_words_is_kept_to_as_far_as_known_unless_it_is_strict(runner):
    odd = {"oneOf": [CITY, CITY], "$defs": CITY["$defs"], "propertyNames": {"minLength": 1}}
    wish = {"tool_choice": "required", "is_bound": True}
    assert said_by(runner, "So", tools=[tool_of("weather", odd)], **wish)[1][0][0] == "weather"
    with pytest.raises(ApiError, match="Unimplemented"):
        said_by(runner, "So", tools=[tool_of("weather", odd, strict=True)], **wish)


def prompt_of(runner, template, **wish):
    runner.tokenizer.chat_template = template
    with closing(UntrustedText(runner.tokenizer)) as texts:
        (prompt,) = RequestReader(runner.frame, Serving(), texts).prompts(request_of(**wish))
    return prompt


def test_the_template_gets_tools_and_calls_and_the_choice_of_experts_neither(runner):
    shown, prompt = '{"type": "function", "function": {"name": "clock"', prompt_of(runner, HERMES)
    assert shown in prompt.text
    assert prompt.text.endswith("[user] plums[assistant] weather Köln[tool] rain")
    plain = [TURNS[0], {"role": "assistant", "content": ""}]
    for wish in ({"tool_choice": "none"}, {"tools": [{"type": "web_search"}], "messages": plain}):
        other = prompt_of(runner, HERMES, **wish)
        assert other.text.startswith("[user] plums")
        assert other.asked == prompt.asked
    assert shown in prompt_of(runner, {"default": "no", "tool_use": HERMES}).text


def test_a_template_without_calls_gets_them_as_text_so_that_nothing_is_lost(runner):
    odd = {**TURNS[1], "content": "Hm.", "tool_calls": [{"function": {"arguments": "{"}}, {"a": 1}]}
    text = prompt_of(runner, CHAT_TEMPLATE, messages=[*TURNS[:2], odd]).text
    first = '[user] plums\n[assistant] {"name":"weather","arguments":{"city":"Köln"}}\n'
    assert text == first + '[assistant] Hm.\n{"arguments":"{"}\n{"a":1}\n[assistant] '
    assert Calls.of(request_of(), runner) is None
    many = {"function": {"arguments": f"[{'[],' * 10_000}[]]"}}  # reading them takes a second
    text = prompt_of(runner, CHAT_TEMPLATE, messages=[TURNS[0], {**odd, "tool_calls": [many]}]).text
    assert '"arguments":"[[],' in text


@pytest.fixture(scope="module")
def chat(client_with):
    return client_with(template=CHAT_TEMPLATE)


@needs_library
def test_a_forced_call_comes_whole_and_in_a_stream_as_openai_has_it(chat):
    body = {**CHAT, "max_tokens": 90, "tools": [WEATHER, {"type": "x"}], "tool_choice": NAMED}
    (choice,) = ask(chat, path=CHATS, **body)["choices"]
    assert (choice["finish_reason"], choice["message"]["content"]) == ("tool_calls", None)
    (call,) = choice["message"]["tool_calls"]
    assert re.fullmatch("call_[0-9a-f]{24}", call.pop("id"))
    assert json.loads(call["function"].pop("arguments"))["city"] in ("Bonn", "Köln")
    assert call == NAMED
    first, last = (each["choices"][0] for each in chunks_of(chat, CHATS, **body))
    assert first["delta"] == {"role": "assistant", "content": ""}
    assert last["finish_reason"] == "tool_calls"
    (delta,) = last["delta"]["tool_calls"]
    assert delta.items() >= {"index": 0, "type": "function"}.items()
    odd = tool_of("x", {"properties": {"a": {"type": "strange"}}, "required": ["a"]})
    error = error_of(chat, path=CHATS, **CHAT, tools=[odd], tool_choice="required")
    assert "can't" in error["message"]


@pytest.mark.parametrize(
    ("change", "param", "said"),
    [
        ({"tools": [{}]}, "tools", "tools.0.type: Field required"),
        ({"tools": [CLOCK] * 129}, "tools", "at most 128"),
        *(({"tools": [tool_of(name)]}, "tools", "pattern") for name in ("a b", "a" * 65, "")),
        *(
            ({"tools": [CLOCK], "tool_choice": choice}, "tool_choice", "one function of")
            for choice in (NAMED, "any", {"type": "function", "function": 1})
        ),
        ({"tools": [{"type": "x"}], "tool_choice": "required"}, "tool_choice", "one function of"),
        ({"messages": [{"role": "assistant", "tool_calls": [1]}]}, "messages", "dictionary"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_tools_that_cannot_be_are_refused(chat, change, param, said):
    error = error_of(chat, path=CHATS, **{**CHAT, **change})
    assert said in error["message"]
    assert error["param"] == param


def test_without_the_library_a_forced_call_is_refused_with_what_to_do(client_with):
    chat = client_with(template=CHAT_TEMPLATE)
    chat.app.state.service.backend.forms.lacks_library = True
    error = error_of(chat, path=CHATS, **CHAT, tools=[CLOCK], tool_choice="required")
    assert "pip install 'phatgoose[json]'" in error["message"]
    assert error["param"] == "tools"
    assert ask(chat, path=CHATS, **CHAT, tools=[CLOCK])


@pytest.mark.parametrize(("template", "times"), [(CHAT_TEMPLATE, 1), (HERMES, 0), (None, 0)])
def test_a_base_without_tools_is_told_of_once_at_start(pool, caplog, template, times):
    with serving.client_of(serving.app_of(pool, template=template)) as client:
        client.post(CHATS, json={**CHAT, "tools": [CLOCK]})
    assert caplog.text.count("no tools") == times
