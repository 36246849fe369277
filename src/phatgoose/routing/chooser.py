"""The choice of experts for a prompt alone, for programs that have an engine of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self, TypeAlias, Unpack

from ..config import RoutingSettings
from ..errors import TaskError
from ..experts.pool import Pool
from ..files import shortened
from ..tasks.task import Chat
from .choice import Chosen
from .conversation import ChatTexts
from .opening import open_chooser
from .routers.prompt import PromptChooser

Messages: TypeAlias = Sequence[Mapping[str, Any]]


class Chooser:
    """Chooses the experts of a pool for a prompt or chat, as a server of that pool does.

        chooser = pg.Chooser.open("experts")
        chosen = chooser.choose([{"role": "user", "content": "Is a heron a bird?"}])
        chosen.expert, chosen.weights, chosen.margin

    It loads what reads prompts, and no base. `experts` are the names of those it chooses among. A
    chooser may be used by several threads.
    """

    def __init__(self, pool: Pool, chooser: PromptChooser) -> None:
        self._pool = pool
        self._chooser = chooser
        self.experts = pool.names

    @classmethod
    def open(cls, place: Pool | str | Path, **settings: Unpack[RoutingSettings]) -> Self:
        """The chooser of the pool at `place`: a folder, "hub:OWNER/NAME", or an open `Pool`.

        `settings` are those of `compose` (`router`, `k`, `reader`, …); by default the first router
        by prompt that the experts allow. Raises ConfigError for a router that chooses for every
        token, and what `Pool.open` raises.
        """
        pool = Pool.open(place)
        return cls(pool, open_chooser(pool, **settings))

    def choose(self, messages: str | Messages, *, explain: bool = False) -> Chosen:
        """The experts for a prompt, or for the last of a chat's `messages` in OpenAI's form.

        Of a message its `role` and `content` count, a text or a list of parts with a `text`. To
        `explain` is to bring example prompts of the expert and the runner-up too. Raises TaskError
        for what is no prompt and no chat.
        """
        prompts = [_read(messages)]
        choice = self._chooser.choose(prompts)
        (chosen,) = self._chooser.explained(choice, prompts)
        return with_nearest(chosen, self._chooser, self._pool) if explain else chosen


def with_nearest(chosen: Chosen, chooser: PromptChooser, pool: Pool) -> Chosen:
    """The same with the example prompts nearest to its view, of experts that bring some."""
    nearest = {}
    for name in (chosen.expert, chosen.runner_up):
        examples = pool[name].prompts if name in pool else ()
        if name and examples and chosen.view:
            nearest[name] = chooser.nearest(chosen.view, examples)
    return replace(chosen, nearest=nearest)


def _read(messages: str | Messages) -> ChatTexts:
    if isinstance(messages, Chat):
        return ChatTexts.of(messages.turns)
    if isinstance(messages, str):
        return ChatTexts.of([("user", messages)])
    turns = []
    for message in messages:
        try:
            content = message.get("content") or ""  # an assistant's may be null
            if not isinstance(content, str):
                content = "".join(part.get("text", "") for part in content)
            turns.append((message["role"], content))
        except (AttributeError, KeyError, TypeError) as error:
            raise TaskError(
                f"A message is {shortened(message)}; wanted is {{'role': …, 'content': a text}}."
            ) from error
    return ChatTexts.of(turns)
