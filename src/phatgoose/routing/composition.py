"""What a routed model is made of, as it is found on the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..base import BaseReference
from ..config import Routing
from ..errors import RoutingError
from ..experts.expert import trained_in_chats
from ..passes import ActsOn
from ..sites import ROUTED
from ..tasks.encoding import Encoder
from ..tasks.task import Chat, Example, question_of
from .context import RoutingContext
from .layers import RoutedLayer, RoutedLinear
from .routers.prompt_router import PromptRouter
from .routers.router import Router, router_of


@dataclass
class Composition:
    """What a routed model is made of; found on it as `model.phatgoose`.

    `experts` are the pool's names in order, `records` their places and hashes; `layers` the routed
    layers by site. `prompt_router` chooses for whole prompts, None where experts are chosen for
    every token. `context` has its choice for the present batch, and where in it those experts act
    that act from a prompt's end on; None without either.
    """

    base: BaseReference
    tokenizer: PreTrainedTokenizerBase | None
    experts: tuple[str, ...]
    records: list[dict[str, Any]]
    routing: Routing
    layers: dict[str, RoutedLayer] = field(default_factory=dict)
    prompt_router: PromptRouter | None = None
    context: RoutingContext | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if self.prompt_router is not None or any(self.acting):
            self.context = RoutingContext(self.prompt_router, self.acting)

    def __repr__(self) -> str:
        what = f"{self.routing.router} on {self.base.id!r}"
        return f"<Composition by {what} (experts: {len(self.experts)})>"

    @property
    def acting(self) -> tuple[ActsOn | None, ...]:
        """The end of prompts that each expert acts on, None for those that act on all tokens."""
        return tuple(ActsOn.of(record.get("acts_on")) for record in self.records)

    @property
    def all_at_ends(self) -> bool:
        """True where every expert leaves the body of a prompt to the base."""
        return None not in self.acting

    @property
    def in_chats(self) -> bool:
        """Whether the experts' statistics are of prompts in the base's chat template."""
        return trained_in_chats(self.records)

    @cached_property
    def router(self) -> Router:
        return router_of(self.routing)


def composition_if_any(model: PreTrainedModel) -> Composition | None:
    """What `model` is made of if it is routed, else None."""
    parts = getattr(model, ROUTED, None)
    return parts if isinstance(parts, Composition) else None


def composition_of(model: PreTrainedModel) -> Composition:
    """What `model` was composed of. Raises RoutingError when it is not routed."""
    parts = composition_if_any(model)
    if parts is None:
        raise RoutingError("This model is not routed; make one with compose(pool).")
    return parts


@contextmanager
def routing_for(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    task: str | None = None,
    examples: Sequence[Example] | None = None,
    encoder: Encoder | None = None,
) -> Iterator[Callable[[Sequence[int]], None]]:
    """Passes of `model` in this thread are about `prompts`, given by tokens, one row for each.

    Yields a function that takes the rows' indices in `prompts`, to call before each pass of others
    than all of them in order. Only routers that choose for whole prompts and experts that act from
    a prompt's end on go by this; in other models, routed or not, nothing changes. An evaluation
    names its `task`, by which router oracle chooses and random routers start again, and the
    `examples`, which retrieval in the paper's form embeds. With the `encoder` that made their
    prompts, routers read the last user message alone of those that are chats. Inside another one,
    that one's prompts count again afterwards. Raises what `PromptRouter.choose` does.
    """
    parts = composition_if_any(model)
    context = parts.context if parts else None
    for layer in parts.layers.values() if parts and task is not None else ():
        if isinstance(layer, RoutedLinear):
            layer.router.restart()
    if context is None:
        yield lambda _: None
        return
    asked = None
    if parts and parts.prompt_router and examples and encoder:
        asked = asked_of(parts, prompts, examples, encoder)
    found = context.routing_of(prompts, asked=asked, examples=examples, task=task)

    def use(rows: Sequence[int]) -> None:
        some = found.of(rows)
        context.use(some.choice, some.beginnings)

    with context.using(found):
        yield use


def asked_of(
    parts: Composition,
    prompts: Sequence[Sequence[int]],
    examples: Sequence[Example],
    encoder: Encoder,
) -> Sequence[Sequence[int]]:
    """What routers per prompt read of `prompts`, which `encoder` made of the `examples`.

    Of chats the last user message alone, in the form in which the experts' prompts were measured.
    """
    is_other = encoder.formatting.chat and not parts.in_chats
    if not is_other and not any(isinstance(each.input, Chat) for each in examples):
        return prompts
    reads = Encoder(
        encoder.tokenizer,
        is_encoder_decoder=encoder.is_encoder_decoder,
        formatting=replace(encoder.formatting, chat=parts.in_chats),
        positions=encoder.positions,
    )

    def asked(example: Example, prompt: Sequence[int]) -> Sequence[int]:
        if isinstance(example.input, Chat):
            return reads.prompt(question_of(example.input.turns))
        return reads.fitted(example.input, example.passage).tokens if is_other else prompt

    return list(map(asked, examples, prompts))
