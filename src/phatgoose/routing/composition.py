"""What a routed model is made of, as it is found on the model."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..base import (
    Base,
    BaseReference,
    check_base,
    check_heeds_masks,
    fingerprint,
    load_base,
    quantisation,
)
from ..config import Routing
from ..errors import RoutingError
from ..experts.expert import tail_of, trained_in_chats
from ..sites import ROUTED, Site, replace_module
from ..tasks.encoding import Encoder
from ..tasks.task import Chat, Example, question_of
from .context import RoutingContext
from .kernels import AUTO
from .layers import FoldedLinear, RoutedLayer, RoutedLinear, folded_weight, is_cheaper_folded
from .routers.prompt import ByPrompt, PromptRouter, Tables
from .routers.router import Router, SiteRouter
from .stacks import SiteStack, check_numbers


def resolve_base(
    base: Base | PreTrainedModel | str | Path | None, wanted: BaseReference, dtype: str = "auto"
) -> Base:
    """The base to route in: a name, loaded in `dtype`, a `Base`, a model, or None for `wanted`.

    A transformers model brings no tokenizer. Raises WrongBaseError where it isn't `wanted`,
    BaseModelError when it reads padding.
    """
    if isinstance(base, PreTrainedModel):
        check_heeds_masks(base.config)
        marks, no_tokenizer = fingerprint(base), cast(PreTrainedTokenizerBase, None)
        base = Base(base, no_tokenizer, wanted.id, wanted.revision, marks)
    elif not isinstance(base, Base):
        revision = None if base else wanted.revision
        base = load_base(base or wanted.id, revision=revision, dtype=dtype)
    kinds = quantisation(base.model)
    if kinds and wanted.fingerprint and base.fingerprint != wanted.fingerprint:
        warnings.warn(
            f"The base model {base.id!r} is quantised ({kinds}), so its weights can't be "
            f"compared with the experts' fingerprint; taking it on trust.",
            stacklevel=3,
        )
        base = replace(base, fingerprint=wanted.fingerprint)
    check_base(wanted, base.reference)
    return base


class Composition:
    """What a routed model is made of; found on it as `model.phatgoose`.

    `experts` are the pool's names in order, `records` their places and hashes; `layers` the routed
    layers by site. `tails` are how many of a prompt's last tokens each expert acts on, None for
    all tokens. `prompt_router` chooses for whole prompts, None where experts are chosen for
    every token. `context` has its choice for the present batch, and where in it those experts act
    that act from a prompt's end on; None without either.
    """

    def __init__(
        self,
        base: Base,
        router: Router,
        experts: tuple[str, ...],
        records: list[dict[str, Any]],
        tables: Tables | None,
    ) -> None:
        """`tables` are those of a router by prompt.

        Raises RoutingError for experts that act from a prompt's end on in an encoder-decoder.
        """
        self.tails = tuple(map(tail_of, records))
        late = [name for name, tail in zip(experts, self.tails, strict=True) if tail]
        if late and base.is_encoder_decoder:
            raise RoutingError(
                f"{', '.join(map(repr, late))} act from a prompt's end on, but in an "
                f"encoder-decoder prompts have a stack of their own; leave them out."
            )
        self.base, self.tokenizer = base.reference, base.tokenizer
        self.router, self.experts, self.records = router, experts, records
        self.layers: dict[str, RoutedLayer] = {}
        self.prompt_router: PromptRouter | None = None
        if isinstance(router, ByPrompt) and tables is not None:
            self.prompt_router = PromptRouter(router, tables, base.tokenizer)
        self.context: RoutingContext | None = None
        if self.prompt_router is not None or late:
            self.context = RoutingContext(self.prompt_router, self.tails)

    def add(self, original: Any, site: Site, stack: SiteStack, state: Mapping[str, Tensor]) -> None:
        """Add the layer that takes the place of `original` at `site`.

        `state` are the router's tensors there. Raises RoutingError for numbers that can't be
        computed with.
        """
        check_numbers(stack, site.name, self.experts)
        sizes = {"E": len(stack.experts), "n": site.in_features, "d": site.out_features}
        for name, letters in self.router.sizes.items():  # kernels trust them, whoever's they are
            wanted = [sizes.get(x, got) for x, got in zip(letters, state[name].shape, strict=True)]
            if wanted != [*state[name].shape]:
                what = f"{site.name}: {name} of router {self.router.name}"
                raise RoutingError(f"{what} is {list(state[name].shape)}, not {wanted}.")
        module = SiteRouter(self.router, site.name, stack.experts, len(self.experts), state)
        module.context = self.context
        # Of a quantised layer the type is of integers.
        is_plain = original.weight.is_floating_point()
        module.to(original.weight.device, original.weight.dtype if is_plain else stack.dtype)
        tails = tuple(self.tails[z] for z in stack.experts.tolist())
        if any(tails) and not module.sees_all:
            raise RoutingError(
                f"Some experts act from a prompt's end on, but {site.name} is inside one of the "
                f"base's own experts, which see some tokens only; leave them out."
            )
        self.layers[site.name] = RoutedLinear(original, site, stack, module, tails)

    def folded(self, original: nn.Module, site: Site, stack: SiteStack) -> bool:
        """Whether the mean of all experts is now inside the weight of `original`: it was cheaper.

        Not where a kernel is named, which computes with the experts' factors.
        """
        plain, size, router = stack.plain_lora, len(self.experts), self.router
        may_fold = router.folds and router.kernel == AUTO and not any(self.tails)
        if not (plain and may_fold and is_cheaper_folded(original, plain)):
            return False
        check_numbers(stack, site.name, self.experts)
        folded = folded_weight(original, plain, size)
        self.layers[site.name] = FoldedLinear(original, site, folded, stack.experts, size)
        return True

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
        context.use(some.choice, some.lengths)

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
        return reads.prompt(example.input) if is_other else prompt

    return list(map(asked, examples, prompts))
