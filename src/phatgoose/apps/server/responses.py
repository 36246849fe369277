"""OpenAI's Responses API without a memory: a body becomes a chat, and its answer a response.

Forms are those of openai 3.57.
"""

from __future__ import annotations

import secrets
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict, Field, model_validator

from ...files import shortened
from .protocol import INVALID, SHOWN, ApiError, ChatRequest, Message, bad_request
from .replies import Builder, Progress, Reports
from .requests import Asked

Fields = dict[str, Any]
NAMES = {"messages": "input", "max_tokens": "max_output_tokens", "response_format": "text"}
NAMES |= {"reasoning_effort": "reasoning"}  # of chats, and of responses
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
    def _as_chat(cls, body: Any) -> Any:
        # Of another kind than it should be, a value is left for chats to refuse.
        fields = {**body} if isinstance(body, dict) else {}
        for name in KEPT:
            if fields.pop(name, None):
                raise bad_request(f"{name}: {KEEPS_NOTHING}", name, INVALID)
        items = fields.get("input")
        items = [{"role": "user", "content": items}] if isinstance(items, str) else items
        if isinstance(tools := fields.get("tools"), list):  # Codex always sends other kinds too
            known = [each for each in tools if _inside(each, "type") in ("function", [each])]
            tools = [_nested("function", each) for each in known] or None
        choice = _nested("function", fields.get("tool_choice"))  # engines refuse auto without tools
        fields |= {"tools": tools, "tool_choice": None if choice == "auto" else choice}
        fields["reasoning"] = _inside(fields.get("reasoning") or {}, "effort")
        fields["text"] = _nested("json_schema", _inside(fields.get("text") or {}, "format"))
        return {**fields, "input": _messages(items) if isinstance(items, list) else items}

    @model_validator(mode="after")
    def _instructed(self) -> ResponsesRequest:
        # Not before: errors number the messages as they were sent.
        if self.instructions:
            first = {"role": "system", "content": self.instructions}
            self.messages.insert(0, Message.model_validate(first))
        return self


def _messages(items: list[Any]) -> list[Fields]:
    """A chat's messages; an assistant's calls are in one with what it said before them."""
    messages = list[Fields]()
    for item in items:
        kind = _inside(item, "type") or "message"
        if kind == "function_call":
            function = {name: item.get(name) for name in ("name", "arguments")}
            call = {"id": item.get("call_id"), "type": "function", "function": function}
            if not messages or messages[-1]["role"] != "assistant":
                messages.append({"role": "assistant"})
            messages[-1].setdefault("tool_calls", []).append(call)
        elif kind in ("message", "function_call_output"):
            role, name = ("tool", "output") if kind != "message" else (item.get("role"), "content")
            message = {"role": role, "content": item.get(name), "tool_call_id": item.get("call_id")}
            messages.append(message)
        elif kind != "reasoning":  # which clients send back
            why = f"input: {shortened(str(kind), SHOWN)} is no message or function_call"
            raise bad_request(f"{why}. {KEEPS_NOTHING}", "input", INVALID)
    return messages


def _inside(value: Any, name: str) -> Any:
    """A field of an object; of anything else a list with it, which is refused as a field."""
    return value.get(name) if isinstance(value, dict) else [value]


def _nested(kind: str, flat: Any) -> Any:
    """A tool or a format: what is beside a type here is one level below in chats."""
    if not isinstance(flat, dict):
        return flat
    fields = {name: each for name, each in flat.items() if name != "type"}
    return {"type": flat.get("type"), **({kind: fields} if fields else {})}


TEXT = -1  # the number of the text among calls
KINDS = {"message": "output_text", "function_call": "function_call_arguments"}  # of events
PART: Fields = {"type": "output_text", "annotations": [], "logprobs": []}
CUT = {"length": "max_output_tokens", "content_filter": "content_filter"}
# What a response has where its request doesn't say it, and what it has in any case.
USUAL: Fields = {"tools": [], "tool_choice": "auto", "parallel_tool_calls": True, "metadata": {}}
BEGUN: Fields = {"object": "response", "status": "in_progress", "output": [], "store": False}
DETAILS = {"input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0}}
DETAILS |= {"output_tokens_details": {"reasoning_tokens": 0}}


class ResponseBuilder(Builder):
    """Builds the response to `body`, which it repeats, whole or as events.

    The text and each call are items, which begin with their first piece and end with the answer.
    The last event reports the routing.
    """

    def __init__(self, body: Fields, asked: Asked, report: Reports) -> None:
        super().__init__(asked, report)
        self._seen, self._items, self._made = list[Progress](), dict[int, list[Fields]](), 0
        repeated = {n: each for n, each in body.items() if n != "input" and each is not None}
        identity = {"id": f"resp_{secrets.token_hex(12)}", "created_at": self._identity["created"]}
        self._response = {**USUAL, **repeated, **BEGUN, **identity}

    def opening(self) -> list[Fields]:
        return [self._event(kind, response=self._response) for kind in ("created", "in_progress")]

    def chunks(self, progress: Progress) -> list[Fields]:
        self._count(progress)
        self._seen.append(progress)
        item: Fields = {"type": "message", "role": "assistant", "content": []}
        events = self._said(TEXT, progress.text, item) if progress.text else []
        for number, call in enumerate(progress.message.get("tool_calls") or ()):
            function = call.get("function") or {}
            item = {"type": "function_call", "call_id": call.get("id"), **function, "arguments": ""}
            events += self._said(call.get("index", number), function.get("arguments") or "", item)
        return events

    def _said(self, number: int, new: str, item: Fields) -> list[Fields]:
        """The events of what is `new` of an item, which begins as `item` if it isn't there."""
        events = []
        if number not in self._items:
            item |= {"id": f"{item['type']}_{secrets.token_hex(12)}", "status": "in_progress"}
            place = {"item_id": item["id"], "output_index": (index := len(self._items))}
            self._items[number] = [item, place]
            events.append(self._event("output_item.added", output_index=index, item={**item}))
            if number == TEXT:
                place |= {"content_index": 0, "logprobs": []}
                events.append(self._event("content_part.added", **place, part={**PART, "text": ""}))
        item, place = self._items[number]
        if number != TEXT:
            item["arguments"] += new
        return [*events, self._event(f"{KINDS[item['type']]}.delta", **place, delta=new)]

    def closing(self) -> list[Fields]:
        answer, used, events = Progress.joined(self._seen), self.usage, list[Fields]()
        reason = CUT.get(answer.finish or "")
        status = "incomplete" if reason else "completed"
        for index, (item, place) in enumerate(self._items.values()):
            item["status"], is_text = status, item["type"] == "message"
            named = {name: item.get(name) for name in ("name", "arguments")}
            said = {"text": answer.text} if is_text else named
            events.append(self._event(f"{KINDS[item['type']]}.done", **place, **said))
            if is_text:
                item["content"] = [part := {**PART, **said}]
                events.append(self._event("content_part.done", **place, part=part))
            events.append(self._event("output_item.done", output_index=index, item=item))
        usage = {"input_tokens": used["prompt_tokens"], "output_tokens": used["completion_tokens"]}
        ended: Fields = {"status": status, "incomplete_details": reason and {"reason": reason}}
        ended |= {"usage": {**usage, "total_tokens": used["total_tokens"], **DETAILS}}
        ended |= {"output": [item for item, _ in self._items.values()]}
        response = {**self._response, **ended, "routing": self._report(answer)}
        return [*events, self._event(status, response=response)]

    def failed(self, error: ApiError) -> list[Fields]:
        why = {"code": "server_error", "message": str(error.detail)}
        failed = {**self._response, "status": "failed", "error": why}
        return [self._event("failed", response=failed)]

    def whole(self, events: Any) -> Any:
        for progress in events[0]:
            self.chunks(progress)
        return self.closing()[-1]["response"]

    def _event(self, kind: str, **fields: Any) -> Fields:
        self._made += 1
        return {"type": f"response.{kind}", "sequence_number": self._made - 1, **fields}
