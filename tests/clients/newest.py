"""Clients that work with the newest openai, with their defaults: newest.txt."""

import os

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # the package's, not the net's

import agents
import litellm
import openai
from common import ASKED, KEY, MODEL, PROMPT, QUESTION, TALK, URL, Weather, check, check_freed
from common import weather as rain
from langchain.agents import create_agent
from langchain_core.messages import ToolMessage
from langchain_openai import ChatOpenAI, OpenAI
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

TOOL = openai.pydantic_function_tool(Weather, name="weather")
FORCED = {"type": "function", "function": {"name": "weather"}}
client = openai.OpenAI(base_url=URL, api_key=KEY, max_retries=0, timeout=120)


def chat(messages=TALK, **wish):
    return client.chat.completions.create(model=MODEL, messages=messages, **wish)


def back(message):
    """The messages that send a forced call and its answer back; the call has its form."""
    (call,) = message.tool_calls
    assert call.function.name == "weather"
    Weather.model_validate_json(call.function.arguments)
    return [*QUESTION, message, {"role": "tool", "tool_call_id": call.id, "content": "rain"}]


with check("openai", "models, chat and a second turn"):
    assert MODEL in [model.id for model in client.models.list()]
    said = chat().choices[0].message
    assert said.content
    assert chat([*TALK, said, *QUESTION]).usage.completion_tokens
with check("openai", "stream"):
    *chunks, last = chat(stream=True, stream_options={"include_usage": True})
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert last.usage.completion_tokens
with check("openai", "stream that is left"):
    with chat(stream=True) as chunks:
        next(iter(chunks))
    check_freed()
with check("openai", "tools"):
    assert chat(QUESTION, tools=[TOOL]).choices[0].finish_reason
    assert not chat(QUESTION, tools=[TOOL], tool_choice="none").choices[0].message.tool_calls
for choice in ("required", FORCED):
    with check("openai", "forced tool and its answer"):
        said = chat(QUESTION, tools=[TOOL], tool_choice=choice).choices[0].message
        assert chat(back(said), tools=[TOOL]).choices[0].finish_reason
with check("openai", "forced tool in a stream"):
    wish = {"model": MODEL, "messages": QUESTION, "tools": [TOOL], "tool_choice": FORCED}
    with client.chat.completions.stream(**wish) as events:
        assert back(events.get_final_completion().choices[0].message)
with check("openai", "JSON schema"):
    wish = {"model": MODEL, "messages": QUESTION, "response_format": Weather}
    assert client.chat.completions.parse(**wish).choices[0].message.parsed
with check("openai", "settings"):
    wish = {"n": 2, "logprobs": True, "top_logprobs": 2, "stop": ["\n"], "seed": 1, "user": "me"}
    wish |= {"frequency_penalty": 0.4, "presence_penalty": 0.2, "logit_bias": {"50": -100}}
    wish |= {"store": False, "metadata": {"a": "b"}, "service_tier": "auto", "top_p": 0.9}
    wish |= {"reasoning_effort": "low", "prompt_cache_key": "x", "max_completion_tokens": 100_000}
    extra = {"top_k": 20, "min_p": 0.05, "repetition_penalty": 1.1}
    assert len(chat(**wish, extra_body=extra).choices) == 2
with check("openai", "completion"):
    assert client.completions.create(model=MODEL, prompt=PROMPT, best_of=1, echo=False).usage
    assert list(client.completions.create(model=MODEL, prompt=PROMPT, stream=True))
with check("openai", "responses"):
    first = client.responses.create(model=MODEL, input=PROMPT, instructions="Be brief.")
    assert first.output_text
    assert client.responses.create(model=MODEL, input=[*TALK, *first.output, *QUESTION]).output
with check("openai", "responses by JSON schema, and a stream"):
    wish = {"model": MODEL, "input": ASKED, "text_format": Weather}
    assert client.responses.parse(**wish).output_parsed
    with client.responses.stream(**wish) as events:
        assert "response.output_text.delta" in [event.type for event in events]
        assert events.get_final_response().output_parsed
with check("openai", "responses with a forced tool"):
    tool = {"type": "function", **TOOL["function"]}
    wish = {"model": MODEL, "tools": [tool], "tool_choice": "required"}
    (call,) = client.responses.create(input=QUESTION, **wish).output
    Weather.model_validate_json(call.arguments)
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}
    talk = [*QUESTION, call, result]
    assert client.responses.create(model=MODEL, tools=[tool], input=talk).output

PLACE = {"base_url": URL, "api_key": KEY}
model = ChatOpenAI(model=MODEL, max_retries=0, **PLACE)
with check("langchain-openai", "invoke, stream and batch"):
    assert model.invoke(PROMPT).content
    assert "".join(chunk.content for chunk in model.stream(PROMPT))
    assert len(model.batch([PROMPT, ASKED])) == 2
    OpenAI(model=MODEL, **PLACE).invoke(PROMPT)
with check("langchain-openai", "agent with tools"):
    assert create_agent(model, [rain]).invoke({"messages": [("user", ASKED)]})["messages"]
with check("langchain-openai", "forced tool and its answer"):
    bound = model.bind_tools([Weather], tool_choice="any")
    said, chunks = bound.invoke(ASKED), list(bound.stream(ASKED))
    (call,) = said.tool_calls
    result = ToolMessage(rain(Weather(**call["args"]).city), tool_call_id=call["id"])
    assert sum(chunks[1:], chunks[0]).tool_calls
    assert model.bind_tools([Weather]).invoke([("user", ASKED), said, result])
with check("langchain-openai", "JSON schema"):
    assert model.with_structured_output(Weather).invoke(ASKED)
with check("langchain-openai", "structured, by a forced tool"):
    assert model.with_structured_output(Weather, method="function_calling").invoke(ASKED)
with check("langchain-openai", "responses"):
    assert ChatOpenAI(model=MODEL, use_responses_api=True, **PLACE).invoke(PROMPT).content


def complete(messages=TALK, **wish):
    place = {"model": f"openai/{MODEL}", "api_base": URL, "api_key": KEY, "num_retries": 0}
    return litellm.completion(messages=messages, **place, **wish)


with check("litellm", "completion, stream and text"):
    assert complete().choices[0].message.content
    assert "".join(chunk.choices[0].delta.content or "" for chunk in complete(stream=True))
    place = {"model": f"text-completion-openai/{MODEL}", "api_base": URL, "api_key": KEY}
    assert litellm.text_completion(prompt=PROMPT, **place).usage
with check("litellm", "settings"):
    wish = {"frequency_penalty": 0.1, "seed": 3, "user": "me", "parallel_tool_calls": False}
    wish |= {"reasoning_effort": "low", "drop_params": True, "metadata": {"a": "b"}, "top_k": 20}
    assert complete(**wish).choices[0].message.content
with check("litellm", "JSON schema"):
    said = complete(QUESTION, response_format=Weather).choices[0].message.content
    assert Weather.model_validate_json(said)
with check("litellm", "tools"):
    assert complete(QUESTION, tools=[TOOL]).choices[0].finish_reason
with check("litellm", "forced tool and its answer"):
    said = complete(QUESTION, tools=[TOOL], tool_choice=FORCED).choices[0].message
    assert complete(back(said), tools=[TOOL]).choices[0].finish_reason
with check("litellm", "responses"):
    place = {"model": f"openai/{MODEL}", "api_base": URL, "api_key": KEY}
    assert litellm.responses(input=PROMPT, **place).output

agents.set_tracing_disabled(True)
agents.set_default_openai_client(openai.AsyncOpenAI(**PLACE), use_for_tracing=False)


SOON = [".", "!", ",", "\n", *(f" {letter}" for letter in "abfhiostwy")]  # in any answer


def run(talk, forced=None, **wish):
    # It takes an answer that was cut for an error, and a stop would break a forced call.
    ends = {} if forced else {"stop": SOON}
    settings = agents.ModelSettings(tool_choice=forced, extra_body=ends)
    agent = agents.Agent("it", model=MODEL, model_settings=settings, **wish)
    return agents.Runner.run_sync(agent, talk)


tools = [agents.function_tool(rain)]
with check("openai-agents", "responses, and a second turn with tools"):
    first = run(PROMPT, instructions="Be brief.")
    assert run([*first.to_input_list(), *QUESTION], tools=tools).raw_responses
with check("openai-agents", "responses by JSON schema"):
    assert run(ASKED, output_type=Weather).final_output
with check("openai-agents", "responses with a forced tool and its answer"):
    called = run(ASKED, "required", tools=tools, tool_use_behavior="stop_on_first_tool")
    assert run(called.to_input_list(), tools=tools).raw_responses

place = OpenAIProvider(**PLACE)
model = OpenAIChatModel(MODEL, provider=place)
with check("pydantic-ai-slim", "text and a second turn"):
    agent = Agent(model, instructions="Be brief.")
    history = agent.run_sync(PROMPT).all_messages()
    assert agent.run_sync(ASKED, message_history=history).output
with check("pydantic-ai-slim", "tools"):
    assert Agent(model, tools=[rain]).run_sync(ASKED).output
with check("pydantic-ai-slim", "a type, by a forced tool"):
    assert Agent(model, output_type=Weather).run_sync(ASKED).output
with check("pydantic-ai-slim", "JSON schema"):
    assert Agent(model, output_type=NativeOutput(Weather)).run_sync(ASKED).output
with check("pydantic-ai-slim", "responses"):
    assert Agent(OpenAIResponsesModel(MODEL, provider=place)).run_sync(PROMPT).output
