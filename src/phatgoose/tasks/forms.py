"""The forms that rows of other programs have, recognised by their columns, as input and target.

Chats (`messages`), prompt and completion, and instruction, input and output are what TRL, OpenAI's
fine-tuning and Alpaca call them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import TaskError
from ..files import shortened
from .task import Chat

OWN = ("input", "target")
OTHERS = (("messages",), ("prompt", "completion"), ("instruction", "output"))
ANSWERS = ("answer", "response", "output", "completion", "summary", "label", "category")
KNOWN = (
    "input and target; messages; prompt and completion; instruction, input (optional) and output"
)


def in_our_form(row: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """`row` with an input and a target, if it has one of the `OTHERS`; else `row` itself.

    An input of turns is a `Chat`. Raises TaskError for a chat that doesn't end with the assistant,
    or holds what is no text.
    """
    if row.get("target") is not None:
        return row
    forms = [form for form in OTHERS if all(name in row for name in form)]
    form = next((f for f in forms if all(row[name] is not None for name in f)), None)
    if forms and form is None and row.get("input") is None:
        empty = next(name for name in forms[0] if row[name] is None)
        raise TaskError(f"{where}: {empty} is empty.")
    if form == ("messages",):
        return {**row, **_chat(row["messages"], where)}
    if form == ("prompt", "completion"):
        prompt, completion = row["prompt"], row["completion"]
        if not isinstance(prompt, list | tuple):
            # What follows a prompt is set off by a space of ours.
            return stripped_answers({**row, "input": str(prompt), "target": str(completion)})
        return {**row, **_chat([*_turns(prompt, where), *_turns(completion, where)], where)}
    if form is not None:
        given = (row.get(name) for name in ("instruction", "input"))
        parts = ("" if value is None else str(value).strip() for value in given)
        text = "\n\n".join(part for part in parts if part)
        return {**row, "input": text, "target": row["output"]}
    return row


def stripped_answers(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """`row` without white space around its target, choices and references, which stay equal."""

    def stripped(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [stripped(each) for each in value]
        return value.strip() if isinstance(value, str) else value

    answers = ("target", "choices", "references")
    return {key: stripped(value) if key in answers else value for key, value in row.items()}


def template_for(row: Mapping[str, Any]) -> str | None:
    """A template that may read `row`, whose form isn't known; None if it has too few columns."""
    names = [str(name) for name in row if str(name).isidentifier()]
    chats = [name for name in names if _is_turns(row[name])]
    if chats:
        field = "value" if "value" in row[chats[0]][0] else "content"
        first, last = (f"{{{{ {chats[0]}[{place}].{field} }}}}" for place in (0, -1))
        return f"{first} ||| {last}"
    if len(names) < 2 or set(names) & set(OWN):
        return None
    answer = next((name for name in ANSWERS if name in names), names[-1])
    asked = " ".join(f"{{{{ {name} }}}}" for name in names if name not in (answer, "split"))
    return f"{asked} ||| {{{{ {answer} }}}}"


def _chat(messages: Any, where: str) -> dict[str, Any]:
    turns = [_turn(each, where) for each in _turns(messages, where)]
    if len(turns) < 2 or turns[-1][0] != "assistant":
        roles = ", ".join(role for role, _ in turns) or "none"
        raise TaskError(
            f"{where}: messages must end with what the assistant says to others; the roles there "
            f"are {roles}."
        )
    *before, (_, answer) = turns
    if not any(content.strip() for _, content in before):
        raise TaskError(f"{where}: nothing is said in messages before the assistant's answer.")
    return {"input": Chat(before), "target": answer}


def _turns(messages: Any, where: str) -> Sequence[Any]:
    messages = messages.tolist() if hasattr(messages, "tolist") else messages
    if not isinstance(messages, list | tuple):
        raise TaskError(f"{where}: messages must be a list of turns, got {shortened(messages)}.")
    return messages


def _turn(message: Any, where: str) -> tuple[str, str]:
    if not isinstance(message, Mapping):
        raise TaskError(f"{where}: a message must have role and content, got {shortened(message)}.")
    role, content = message.get("role"), message.get("content")
    if isinstance(content, list):  # OpenAI's parts
        texts = [part.get("text") for part in content if isinstance(part, Mapping)]
        whole = len(texts) == len(content) and all(isinstance(text, str) for text in texts)
        content = "".join(map(str, texts)) if whole else None
    if not isinstance(role, str) or not isinstance(content, str) or message.get("tool_calls"):
        raise TaskError(
            f"{where}: a message must have a role and a content of text, which tool calls and "
            f"pictures are not; got {shortened(dict(message))}."
        )
    return role, content


def _is_turns(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], Mapping)
