"""OpenAI's Responses API without a memory: a body becomes a chat, and its answer a response.

Forms are those of openai 3.57.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import ClassVar, Literal, NamedTuple

from pydantic import ConfigDict, Field, model_validator

from ...files import shortened
from .protocol import INVALID, SHOWN, ApiError, ChatRequest, Fields, Message, bad_request
from .replies import Builder, Progress, Reports
from .requests import PreparedRequest

# Fields of chats, and of responses.
NAMES = {
    "messages": "input",
    "max_tokens": "max_output_tokens",
    "response_format": "text",
    "reasoning_effort": "reasoning",
}
KEPT = "store", "previous_response_id", "conversation", "background", "prompt"
KEEPS_NOTHING = "This server keeps nothing: send the whole conversation as input, and store: false."


class ResponsesRequest(ChatRequest):
    """A body of OpenAI's Responses API, answered as the chat that it becomes; nothing is kept.

    `input` is a text or items, `text` has the answer's format, `reasoning` its effort.
    """

    model_config = ConfigDict(alias_generator=lambda name: NAMES.get(name, name))
    asks: ClassVar[str] = "input"
    include: list[Literal["reasoning.encrypted_content"]] | None = Field(None, exclude=True)
    instructions: str | None = Field(None, exclude=True, description="Before the input.")
    n: Literal[1] | None = Field(1, description="There is one answer.")

    @model_validator(mode="before")
    @classmethod
    def _as_chat(cls, body: object) -> Fields:
        # What has another form than it should is left for chats to refuse.
        fields: Fields = {**body} if isinstance(body, dict) else {}
        for name in KEPT:
            if fields.pop(name, None):
                raise bad_request(f"{name}: {KEEPS_NOTHING}", name, INVALID)
        return {
            **fields,
            "input": _messages(fields.get("input")),
            "tools": _functions(fields.get("tools")),
            "tool_choice": _choice(fields.get("tool_choice")),
            "text": _format(fields.get("text")),
            "reasoning": _effort(fields.get("reasoning")),
        }

    @model_validator(mode="after")
    def _instructed(self) -> ResponsesRequest:
        # Not before: errors number the messages as they were sent.
        if self.instructions:
            first = {"role": "system", "content": self.instructions}
            self.messages.insert(0, Message.model_validate(first))
        return self


def _messages(items: object) -> object:
    """A chat's messages; an assistant's calls are in one with what it said before them."""
    if isinstance(items, str):
        return [{"role": "user", "content": items}]
    if not isinstance(items, list):
        return items
    messages = list[Fields]()
    for item in items:
        kind = _kind_of(item)
        if kind == "message":
            message = {"role": item.get("role"), "content": item.get("content")}
            messages.append({**message, "tool_call_id": item.get("call_id")})
        elif kind == "function_call_output":
            message = {"role": "tool", "content": item.get("output")}
            messages.append({**message, "tool_call_id": item.get("call_id")})
        elif kind == "function_call":
            if not messages or messages[-1]["role"] != "assistant":
                messages.append({"role": "assistant"})
            function = {"name": item.get("name"), "arguments": item.get("arguments")}
            call = {"id": item.get("call_id"), "type": "function", "function": function}
            messages[-1].setdefault("tool_calls", []).append(call)
        elif kind != "reasoning":  # which clients send back
            why = f"input: {shortened(kind, SHOWN)} is no message or function_call"
            raise bad_request(f"{why}. {KEEPS_NOTHING}", "input", INVALID)
    return messages


def _kind_of(item: object) -> str:
    """An item's type; of what is no object, how it is shown in the refusal."""
    return str(item.get("type") or "message") if isinstance(item, dict) else str([item])


def _functions(tools: object) -> object:
    """The functions among the tools, in chats' form; Codex always sends other kinds too."""
    if not isinstance(tools, list):
        return tools
    functions = []
    for tool in tools:
        if not isinstance(tool, dict) or tool.get("type") == "function":
            functions.append(_nested("function", tool))
    return functions or None  # engines refuse an empty list


def _choice(choice: object) -> object:
    """A chat's tool_choice; engines refuse auto without tools."""
    return None if choice == "auto" else _nested("function", choice)


def _format(text: object) -> object:
    """A chat's response_format."""
    if not isinstance(text, dict):
        return text or None
    return _nested("json_schema", text.get("format"))


def _effort(reasoning: object) -> object:
    """A chat's reasoning_effort."""
    if not reasoning:
        return None
    return reasoning.get("effort") if isinstance(reasoning, dict) else [reasoning]  # is refused


def _nested(kind: str, flat: object) -> object:
    """A tool or a format: what is beside a type here is one level below in chats."""
    if not isinstance(flat, dict):
        return flat
    nested: Fields = {"type": flat.get("type")}
    fields = {name: value for name, value in flat.items() if name != "type"}
    if fields:
        nested[kind] = fields
    return nested


TEXT = -1  # the number of the text among calls
KINDS = {"message": "output_text", "function_call": "function_call_arguments"}  # of events
PART: Fields = {"type": "output_text", "annotations": [], "logprobs": []}
CUT = {"length": "max_output_tokens", "content_filter": "content_filter"}
# What a response has where its request doesn't say it, and what it has in any case.
USUAL: Fields = {"tools": [], "tool_choice": "auto", "parallel_tool_calls": True, "metadata": {}}
BEGUN: Fields = {"object": "response", "status": "in_progress", "output": [], "store": False}
DETAILS = {
    "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
    "output_tokens_details": {"reasoning_tokens": 0},
}


class Item(NamedTuple):
    """A part of a response: its fields, and those of its events that say where it is."""

    fields: Fields
    place: Fields

    @property
    def kind(self) -> str:
        """How the events of its content are called."""
        return KINDS[self.fields["type"]]


class ResponseBuilder(Builder):
    """Builds the response to `body`, which it repeats, whole or as events.

    The text and each call are items, which begin with their first piece and end with the answer.
    The last event reports the routing.
    """

    def __init__(self, body: Fields, prepared: PreparedRequest, report: Reports) -> None:
        super().__init__(prepared, report)
        self._seen = list[Progress]()
        self._items = dict[int, Item]()
        self._events = 0
        repeated = {
            name: value for name, value in body.items() if name != "input" and value is not None
        }
        self._response: Fields = {
            **USUAL,
            **repeated,
            **BEGUN,
            "id": f"resp_{secrets.token_hex(12)}",
            "created_at": self._identity["created"],
        }

    def opening(self) -> list[Fields]:
        return [self._event(kind, response=self._response) for kind in ("created", "in_progress")]

    def chunks(self, progress: Progress) -> list[Fields]:
        self._count(progress)
        self._seen.append(progress)
        events = list[Fields]()
        if progress.text:
            fields: Fields = {"type": "message", "role": "assistant", "content": []}
            events += self._grown(TEXT, progress.text, fields)
        for number, call in enumerate(progress.message.get("tool_calls") or ()):
            function = call.get("function") or {}
            fields = {
                "type": "function_call",
                "call_id": call.get("id"),
                **function,
                "arguments": "",
            }
            arguments = function.get("arguments") or ""
            events += self._grown(call.get("index", number), arguments, fields)
        return events

    def _grown(self, number: int, new: str, fields: Fields) -> list[Fields]:
        """The events of what is `new` of an item, which has these `fields` if it begins."""
        events = []
        if number not in self._items:
            index = len(self._items)
            fields["id"] = f"{fields['type']}_{secrets.token_hex(12)}"
            fields["status"] = "in_progress"
            place: Fields = {"item_id": fields["id"], "output_index": index}
            events.append(self._event("output_item.added", output_index=index, item={**fields}))
            if number == TEXT:
                place |= {"content_index": 0, "logprobs": []}
                events.append(self._event("content_part.added", **place, part={**PART, "text": ""}))
            self._items[number] = Item(fields, place)
        item = self._items[number]
        if number != TEXT:
            item.fields["arguments"] += new
        return [*events, self._event(f"{item.kind}.delta", **item.place, delta=new)]

    def closing(self) -> list[Fields]:
        answer = Progress.joined(self._seen)
        reason = CUT.get(answer.finish or "")
        status = "incomplete" if reason else "completed"
        events = list[Fields]()
        for index, item in enumerate(self._items.values()):
            fields = item.fields
            fields["status"] = status
            if fields["type"] == "message":
                part = {**PART, "text": answer.text}
                fields["content"] = [part]
                events += [
                    self._event(f"{item.kind}.done", **item.place, text=answer.text),
                    self._event("content_part.done", **item.place, part=part),
                ]
            else:
                named = {"name": fields.get("name"), "arguments": fields["arguments"]}
                events.append(self._event(f"{item.kind}.done", **item.place, **named))
            events.append(self._event("output_item.done", output_index=index, item=fields))
        usage = self.usage
        response = {
            **self._response,
            "status": status,
            "incomplete_details": reason and {"reason": reason},
            "usage": {
                "input_tokens": usage["prompt_tokens"],
                "output_tokens": usage["completion_tokens"],
                "total_tokens": usage["total_tokens"],
                **DETAILS,
            },
            "output": [item.fields for item in self._items.values()],
            "routing": self._report(answer),
        }
        return [*events, self._event(status, response=response)]

    def failed(self, error: ApiError) -> list[Fields]:
        why = {"code": "server_error", "message": str(error.detail)}
        failed = {**self._response, "status": "failed", "error": why}
        return [self._event("failed", response=failed)]

    def whole(self, events: Sequence[Sequence[Progress]]) -> Fields:
        for progress in events[0]:
            self.chunks(progress)
        response: Fields = self.closing()[-1]["response"]
        return response

    def _event(self, kind: str, **fields: object) -> Fields:
        number = self._events
        self._events += 1
        return {"type": f"response.{kind}", "sequence_number": number, **fields}
