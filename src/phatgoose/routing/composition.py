"""What a routed model is made of, as it is found on the model."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..base import (
    Base,
    BaseReference,
    check_heeds_masks,
    fingerprint,
    load_base,
    quantisation,
)
from ..config import Routing
from ..errors import ConfigError, RoutingError
from ..experts.expert import trained_in_chats
from ..passes import ActsOn
from ..sites import ROUTED, Site, execution_device, replace_module
from ..tasks.encoding import Encoder
from ..tasks.task import Chat, Example, question_of
from .context import RoutingContext
from .layers import FoldedLinear, RoutedLayer, RoutedLinear, folded_weight, is_cheaper_folded
from .routers.prompt import ByPrompt, PromptRouter, Tables
from .routers.router import OWN_EXPERTS, Router, SiteRouter
from .stacks import SiteStack, check_numbers


class ResolvedBase(NamedTuple):
    """A base model to route in, not routed yet; `tokenizer` None means that none came with it."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    reference: BaseReference


def resolve_base(
    base: Base | PreTrainedModel | str | Path | None, wanted: BaseReference, dtype: str = "auto"
) -> ResolvedBase:
    """The base given as a name, loaded in `dtype`, as a `Base` or a model; None means `wanted`.

    Raises RoutingError when the model is routed already, BaseModelError when it reads padding.
    """
    if base is None:
        base = load_base(wanted.id, revision=wanted.revision, dtype=dtype)
    elif isinstance(base, str | Path):
        base = load_base(base, dtype=dtype)
    model = base.model if isinstance(base, Base) else base
    check_heeds_masks(model.config)
    if hasattr(model, ROUTED):
        raise RoutingError("This base model is routed already; detach it first.")
    tokenizer = base.tokenizer if isinstance(base, Base) else None
    reference = (
        base.reference
        if isinstance(base, Base)
        else BaseReference(wanted.id, wanted.revision, fingerprint(model))
    )
    kinds = quantisation(model)
    if kinds and wanted.fingerprint and reference.fingerprint != wanted.fingerprint:
        warnings.warn(
            f"The base model {reference.id!r} is quantised ({kinds}), so its weights can't be "
            f"compared with the experts' fingerprint; taking it on trust.",
            stacklevel=3,
        )
        reference = replace(reference, fingerprint=wanted.fingerprint)
    return ResolvedBase(model, tokenizer, reference)


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
    router: Router
    layers: dict[str, RoutedLayer] = field(default_factory=dict)
    prompt_router: PromptRouter | None = None
    context: RoutingContext | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if self.prompt_router is not None or any(self.acting):
            self.context = RoutingContext(self.prompt_router, self.acting)

    @classmethod
    def on(
        cls,
        base: ResolvedBase,
        router: Router,
        experts: tuple[str, ...],
        records: list[dict[str, Any]],
        tables: Tables | None,
    ) -> Composition:
        """What a model routed on `base` is made of but its layers; `tables` for a router by prompt.

        Raises RoutingError for experts that act from a prompt's end on in an encoder-decoder.
        """
        if base.model.config.is_encoder_decoder:
            refuse_late(records)
        prompt_router = None
        if isinstance(router, ByPrompt) and tables is not None:
            if base.tokenizer is None and router.reads_prompts:
                raise ConfigError(
                    f"Router {router.name} reads prompts; hand the base over with its tokenizer."
                )
            prompt_router = PromptRouter(router, tables, base.tokenizer)
        return cls(
            base.reference, base.tokenizer, experts, records, router, prompt_router=prompt_router
        )

    def add(
        self,
        original: Any,
        site: Site,
        stack: SiteStack,
        state: Mapping[str, Tensor],
        *,
        may_fold: bool = False,
    ) -> None:
        """Add the layer that takes the place of `original` at `site`.

        `state` are the router's tensors there; `may_fold` folds the mean of all experts into the
        weight where that is cheaper. Raises RoutingError for numbers that can't be computed with.
        """
        router, plain, size = self.router, stack.plain_lora, len(self.experts)
        columns = self._columns(site, stack.experts)
        check_numbers(stack, site.name, self.experts)
        foldable = plain and may_fold and router.folds and not any(columns)
        if plain and foldable and is_cheaper_folded(original, plain):
            folded = folded_weight(original, plain, size)
            self.layers[site.name] = FoldedLinear(original, site, folded, stack.experts, size)
            return
        sizes = {"E": len(stack.experts), "n": site.in_features, "d": site.out_features}
        for name, letters in router.sizes.items():  # kernels trust them, whoever's router it is
            wanted = [sizes.get(x, got) for x, got in zip(letters, state[name].shape, strict=True)]
            if wanted != [*state[name].shape]:
                what = f"{site.name}: {name} of router {router.name}"
                raise RoutingError(f"{what} is {list(state[name].shape)}, not {wanted}.")
        module = SiteRouter(router, site.name, stack.experts, size, state)
        module.context = self.context
        # Of a quantised layer the type is of integers.
        is_plain = original.weight.is_floating_point()
        module.to(execution_device(original), original.weight.dtype if is_plain else stack.dtype)
        self.layers[site.name] = RoutedLinear(
            original, site, stack, module, router.kernel, self.context, columns
        )

    def _columns(self, site: Site, experts: Tensor) -> list[int]:
        """The columns of the `experts` [E] at `site` in an Activity of the context: 0 acts always.

        Raises RoutingError where an expert that acts from a prompt's end on can't.
        """
        ends = self.context.acting if self.context else ()
        if not ends:
            return []
        acting = self.acting
        late = [z for z in experts.tolist() if acting[z]]
        if late and OWN_EXPERTS in site.name.split("."):
            raise RoutingError(
                f"Expert {self.experts[late[0]]!r} acts from a prompt's end on, but {site.name} is "
                f"inside one of the base's own experts, which see some tokens only; leave it out."
            )
        return [ends.index(end) + 1 if (end := acting[z]) else 0 for z in experts.tolist()]

    def install(self, model: PreTrainedModel) -> None:
        """Put the layers into `model`."""
        for name, layer in self.layers.items():
            replace_module(model, name, layer)
        if self.context is not None:
            self.context.attach(model)
        setattr(model, ROUTED, self)
        model.tokenizer = self.tokenizer

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

    @property
    def routing(self) -> Routing:
        return self.router.routing


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


def refuse_late(records: Iterable[Mapping[str, Any]]) -> None:
    """Raise RoutingError for experts of an encoder-decoder that act from a prompt's end on."""
    late = [record["name"] for record in records if record.get("acts_on") is not None]
    if late:
        raise RoutingError(
            f"{', '.join(map(repr, late))} act from a prompt's end on, but in an encoder-decoder "
            f"prompts have a stack of their own; leave them out."
        )


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
    reads = replace(encoder, formatting=replace(encoder.formatting, chat=parts.in_chats))

    def asked(example: Example, prompt: Sequence[int]) -> Sequence[int]:
        if isinstance(example.input, Chat):
            return reads.prompt(question_of(example.input.turns))
        return reads.fitted(example.input, example.passage).tokens if is_other else prompt

    return list(map(asked, examples, prompts))
