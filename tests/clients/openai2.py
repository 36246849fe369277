"""Clients that hold openai at 2.x, with their defaults: openai2.txt."""

import instructor
import openai
from common import ASKED, KEY, MODEL, PROMPT, QUESTION, URL, Weather, check, weather
from llama_index.core.llms import ChatMessage
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike

raw = openai.OpenAI(base_url=URL, api_key=KEY)
wish = {"model": MODEL, "messages": QUESTION}
with check("instructor", "a type, by a forced tool"):
    create = instructor.from_openai(raw).chat.completions.create
    assert create(response_model=Weather, **wish)
    assert list(create(response_model=instructor.Partial[Weather], stream=True, **wish))
with check("instructor", "JSON schema"):
    client = instructor.from_openai(raw, mode=instructor.Mode.JSON_SCHEMA)
    assert client.chat.completions.create(response_model=Weather, **wish)

LLAMA, TOOL = "llama-index-llms-openai-like", FunctionTool.from_defaults(weather, fn_schema=Weather)


def llm(**wish):
    place = {"model": MODEL, "api_base": URL, "api_key": KEY, "max_retries": 0}
    return OpenAILike(is_chat_model=True, **place, **wish)


with check(LLAMA, "chat, stream and completion"):
    said = llm().chat([ChatMessage(PROMPT)]).message
    assert said.content
    talk = [ChatMessage(PROMPT), said, ChatMessage(ASKED)]
    assert list(llm().stream_chat(talk))[-1].message.content
    assert OpenAILike(model=MODEL, api_base=URL, api_key=KEY).complete(PROMPT).raw
calling = llm(is_function_calling_model=True)
with check(LLAMA, "tools"):
    assert calling.chat_with_tools([TOOL], ASKED).message
with check(LLAMA, "forced tool and its answer"):
    said = calling.chat_with_tools([TOOL], ASKED, tool_required=True)
    (call,) = calling.get_tool_calls_from_response(said)
    more = {"tool_call_id": call.tool_id}
    result = ChatMessage(role="tool", content=str(TOOL(**call.tool_kwargs)), additional_kwargs=more)
    talk = [ChatMessage(ASKED), said.message, result]
    assert calling.chat_with_tools([TOOL], chat_history=talk).message
with check(LLAMA, "a type, by a forced tool"):
    assert calling.structured_predict(Weather, PromptTemplate(ASKED))
with check(LLAMA, "JSON schema"):
    model = llm(should_use_structured_outputs=True)
    assert model.structured_predict(Weather, PromptTemplate(ASKED))
