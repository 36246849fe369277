"""Answers of models here: completions, chats, routing and JSON, of models of each kind."""

import inspect
import itertools
import json

import pytest
import torch
from transformers import PreTrainedTokenizerBase

import serving
from phatgoose.apps.server import create_app, served_models
from phatgoose.apps.server.local import json_form
from phatgoose.base.loading import load_base
from phatgoose.routing.compose import compose, save
from serving import CHAT_TEMPLATE, CHATS, GREEDY, PROMPT, ask, chunks_of, error_of, text_of

needs_library = pytest.mark.skipif(json_form.LLMatcher is None, reason="needs phatgoose[json]")


def generated(pool, router="phatgoose", keep=None, leave_out=(), **options):
    """The tokens of the prompt, and those that `generate` adds in this process."""
    base = load_base(pool.base.id, dtype="float32")
    model = compose(pool.select(keep, leave_out), base, router=router, **options)
    prompt = base.tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    mask = torch.ones_like(prompt)
    tokens = model.generate(prompt, attention_mask=mask, max_new_tokens=6, do_sample=False)[0]
    return prompt[0].tolist(), tokens[prompt.shape[1] :].tolist()


@pytest.mark.parametrize(
    "wish",
    [
        {},
        {"router": "merged"},
        {"router": "arrow:temperature=0.01,form=peft", "k": 1},
        {"k": 1},
        {"keep": ["e1", "e2"]},
        {"leave_out": ["e0"]},
        {"router": "single:expert=e2"},
    ],
    ids=str,
)
def test_a_completion_is_what_generate_gives_with_a_routing_of_its_own_too(
    client, pool, tokenizer, wish
):
    prompt, tokens = generated(pool, **wish)
    assert not wish or tokens != generated(pool)[1]
    reply = ask(client, **GREEDY, **wish)
    assert reply["choices"][0]["text"] == tokenizer.decode(tokens, skip_special_tokens=True)
    counts = {"prompt_tokens": len(prompt), "completion_tokens": len(tokens)}
    assert reply["usage"] == {**counts, "total_tokens": len(prompt) + len(tokens)}


ONLY = ": only null is accepted; supported are "


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"changed": 1}, f"changed{ONLY}model"),  # a property of the request
        ({"echo": True}, "echo: only false is accepted; supported are model, max_tokens"),
        ({"temprature": 1}, "Did you mean 'temperature'?"),
        ({"modalities": ["text", "audio"]}, 'modalities: only ["text"] is accepted'),
        ({"continue_final_message": True}, "continue_final_message: only false is accepted"),
        ({"stream_options": {"pace": 1}}, f"stream_options.pace{ONLY}include_usage"),
        ({"tools": [{}]}, f"tools{ONLY}model, max_tokens"),
        ({"tool_choice": "required"}, 'tool_choice: only "none" is accepted'),
        ({"messages": [{"role": "assistant", "audio": {"id": "a"}}]}, f"messages.0.audio{ONLY}"),
    ],
    ids=str,
)
def test_what_is_not_done_here_is_refused_with_what_is(client, change, said):
    body = {**serving.CHAT, **change} if "messages" in change else {**GREEDY, **change}
    error = error_of(client, path=CHATS if "messages" in change else serving.PATH, **body)
    assert said in error["message"]
    assert error["param"] == next(iter(change))
    assert len(error["message"]) < 600


def test_effort_and_variables_are_the_template_s_to_use(client_with):
    template = "{% if reasoning_effort %}[{{ reasoning_effort }}]{% endif %}" + CHAT_TEMPLATE
    chat = client_with(template=template + "{% if enable_thinking is false %}<>{% endif %}")
    wishes = [{}, {"reasoning_effort": "low"}]
    for variables in ({}, {"enable_thinking": True, "unknown": [1]}, {"enable_thinking": False}):
        wishes.append({"chat_template_kwargs": variables})
    wishes.append({"chat_template_kwargs": {"reasoning_effort": "high", "enable_thinking": False}})
    plain, *others = (
        ask(chat, path=CHATS, **serving.CHAT, **wish)["usage"]["prompt_tokens"] for wish in wishes
    )
    longer = [count - plain for count in others]
    assert longer == [len("[low]"), 0, 0, len("<>"), len("[high]<>")]
    of_transformers = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters
    for name in ("messages", "texts", *of_transformers):
        error = error_of(chat, path=CHATS, **serving.CHAT, chat_template_kwargs={name: 1})
        assert error["message"].startswith(f"chat_template_kwargs: {name} is not a variable")
        assert error["param"] == "chat_template_kwargs"


def test_stop_ends_an_answer(client):
    long = {**GREEDY, "max_tokens": 30}
    whole = text_of(client, **long)
    stop = whole[3:5]
    for wish in (stop, ["nothing", stop]):
        (choice,) = ask(client, **long, stop=wish)["choices"]
        assert (choice["text"], choice["finish_reason"]) == (whole[: whole.index(stop)], "stop")


def test_a_chat_is_the_completion_of_its_template(client_with):
    chat = client_with(template=CHAT_TEMPLATE)
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    messages = [{"role": "developer", "content": "Brief."}, {"role": "user", "content": parts}]
    wish = {"model": "goose", "messages": messages, "temperature": 0, "max_completion_tokens": 6}
    reply = ask(chat, path=CHATS, **wish)
    wanted = ask(chat, **{**GREEDY, "prompt": "[system] Brief.\n[user] hi\n[assistant] "})
    assert reply["usage"] == wanted["usage"]
    content = wanted["choices"][0]["text"]
    message = reply["choices"][0]["message"]
    assert message == {"role": "assistant", "content": content, "refusal": None}


def test_routing_tells_each_tokens_experts_in_a_stream_piece_by_piece(client, tokenizer):
    count, wish = len(tokenizer(PROMPT)["input_ids"]), {**GREEDY, "routing": "trace"}
    (choice,) = ask(client, **wish)["choices"]
    routing = choice["routing"]
    assert (routing["router"], routing["k"]) == ("phatgoose", 2)
    parts = [token["part"] for token in routing["tokens"]]
    assert parts == ["prompt"] * count + ["answer"] * 6
    assert "".join(token["token"] for token in routing["tokens"][:count]) == PROMPT
    for token in routing["tokens"][:-1]:
        assert sum(token["experts"].values()) == pytest.approx(1, abs=0.01)
        assert list(token["experts"].values()) == sorted(token["experts"].values(), reverse=True)
    assert routing["tokens"][-1]["experts"] == {}  # it never passed the model
    trace = routing["trace"]
    assert (trace["format"], trace["whole"]) == ("phatgoose-trace-1", [])
    pieces = [chunk["choices"][0]["routing"] for chunk in chunks_of(client, **wish)]
    pieces = [piece for piece in pieces if piece]
    streams = [piece["trace"]["streams"][0] for piece in pieces]
    for whole, lists in (
        (routing["tokens"], [piece["tokens"] for piece in pieces]),
        (trace["streams"][0]["tokens"], [stream["tokens"] for stream in streams]),
    ):
        assert list(itertools.chain.from_iterable(lists)) == whole
    assert streams[0]["sites"] == trace["streams"][0]["sites"]


def test_saved_models_and_bases_are_served_too_and_what_the_first_name_is_opened_for_nobody(
    pool, tmp_path, tokenizer, hub
):
    """A saved model may come from a stranger, and who asks to reroute it may be one."""
    base = load_base(pool.base.id, dtype="float32")
    save(compose(pool, base, k=1, router="phatgoose"), tmp_path / "routed")
    info = json.loads((tmp_path / "routed" / "routed.json").read_text())
    info["experts"][0]["path"] = "hub:stranger/expert"
    (tmp_path / "routed" / "routed.json").write_text(json.dumps(info))
    places = [str(tmp_path / "routed"), f"base={pool.base.id}", f"pool={serving.folder_of(pool)}"]
    app = create_app(served_models(places, dtype="float32"))
    wanted = tokenizer.decode(generated(pool, k=1)[1], skip_special_tokens=True)
    with serving.client_of(app) as client:
        saved, alone = {**GREEDY, "model": "routed"}, {**GREEDY, "model": "base"}
        assert text_of(client, **saved) == wanted != text_of(client, **alone)
        for change in ({"k": 2}, {"keep": [pool.names[1]]}, {"router": "auto"}):
            assert "its routing can't be changed" in error_of(client, **saved, **change)["message"]
        assert "base model alone" in error_of(client, **alone, routing=True)["message"]
        assert "can't be changed" in error_of(client, **alone, k=1)["message"]
        assert client.get("/v1/models/base").json()["router"] is None
    assert hub.requests == []


def test_mixtures_of_several_sizes_share_a_batch(client):
    mixtures = [{"e0": 1}, {"e0": 0.5, "e1": 0.5}, {"e1": 1, "e2": -0.4, "e3": 0.1}, {"e2": 0}]
    alone = [text_of(client, **GREEDY, weights=each) for each in mixtures]
    with serving.held(1) as go_on:
        running = [serving.beside(text_of, client, **GREEDY, weights=w) for w in mixtures]
        engine = client.app.state.service.backend.engine
        serving.until(lambda: len(engine.running) + engine.waiting == 4)
        go_on.set()
        assert [each.result() for each in running] == alone


# Answers in JSON (`response_format`): they keep to their schema, or the refusal says why.

BIRD = {
    "type": "object",
    "properties": {"kind": {"enum": ["bird", "fish"]}, "note": {"type": "string", "maxLength": 3}},
    "required": ["kind", "note"],
    "additionalProperties": False,
}
ENDLESS = {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}


def by(schema):
    return {"type": "json_schema", "json_schema": {"name": "it", "strict": True, "schema": schema}}


@needs_library
@pytest.mark.parametrize("temperature", [0, 1])
def test_a_random_models_answers_keep_to_the_schema(client, temperature):
    plain = text_of(client, **GREEDY)
    body = {**GREEDY, "max_tokens": 80, "temperature": temperature, "seed": 3}
    choices = ask(client, **body, n=3, response_format=by(BIRD))["choices"]
    for choice in choices:
        assert choice["finish_reason"] == "stop"
        answer = json.loads(choice["text"])
        assert list(answer) == ["kind", "note"]
        assert answer["kind"] in ("bird", "fish")
        assert len(answer["note"]) <= 3
    assert (len({choice["text"] for choice in choices}) > 1) == bool(temperature)
    assert text_of(client, **body, response_format=by(None)).startswith("{")
    assert text_of(client, **GREEDY) == plain


@needs_library
@pytest.mark.parametrize("schema", [{"type": "strange"}, {"$ref": "#"}, ENDLESS], ids=str)
def test_forms_that_cannot_be_are_refused(client, schema):
    error = error_of(client, **{**GREEDY, "max_tokens": 80}, response_format=by(schema))
    assert "The JSON can't be written" in error["message"]


def test_without_the_library_it_is_refused_with_what_to_do(client_with):
    client = client_with()
    client.app.state.service.backend.forms.lacks_library = True
    error = error_of(client, **GREEDY, response_format={"type": "json_object"})
    assert "pip install 'phatgoose[json]'" in error["message"]
    assert error["param"] == "response_format"
