"""The served models, and one forward pass of each.

All routings over one base share its weights, and those of the same experts their stacked factors.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Hashable, Mapping, Sequence
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import replace
from functools import cached_property
from typing import Any, TypeAlias

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from ....analysis.traces import TraceKeeper
from ....base import Base, BaseReference, load_base, load_tokenizer, settled_dtype, twin
from ....config import Routing
from ....errors import BaseModelError, RoutingError
from ....experts.pool import Pool
from ....passes import cache_argument
from ....routing.choices import PromptRouting
from ....routing.compose import compose
from ....routing.composition import composition_if_any
from ....routing.layers import RoutedLinear
from ....routing.open_model import is_pool, is_routed, require_pool
from ....routing.recording import watch
from ....routing.routers.auto import settled
from ....routing.routers.fixed import mixture_of
from ....routing.routers.registry import AUTO, router_of
from ....routing.routers.router import check_served
from ....routing.saved import base_of, load
from ....sites import positions_of
from ....tasks.batching import contiguous_head, position_ids
from ....tasks.encoding import added_tokens
from ....tasks.prompt_passes import end_tokens, keeping_caches
from ..requests import Frame
from ..service import numbered
from ..settings import ServedModel
from .prefixes import PrefixStore, Reader

Cache: TypeAlias = Any  # DynamicCache; transformers has no types for mypy


_NUMBERS = itertools.count()  # of runners: an id would be used again


class ModelRunner:
    """A model with its tokenizer; each pass adds to a cache and shows its routing to any `keeper`.

    `ends` are the tokens that end an answer.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.ends = frozenset(end_tokens(model, tokenizer))
        self.pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        self.vocabulary = int(model.get_input_embeddings().num_embeddings)
        arguments = inspect.signature(model.forward).parameters
        self._takes_positions = "position_ids" in arguments
        self._takes_keep = "logits_to_keep" in arguments
        self._cache_name = cache_argument(model)
        self._parts = parts = composition_if_any(model)
        self._context = parts.context if parts else None
        self._acting = parts.acting if parts else ()  # read from records once
        self._number = next(_NUMBERS)
        positions = positions_of(model)
        self.frame = Frame(
            tokenizer,
            positions.prompt or positions.trained,
            self.vocabulary,
            added_tokens(tokenizer, is_encoder_decoder=False),
            looks_prompts_up=self._context is not None and self._context.router is not None,
            in_chats=parts is not None and parts.in_chats,
        )

    @property
    def device(self) -> torch.device:
        device: torch.device = self.model.device
        return device

    def new_cache(self) -> Cache:
        return DynamicCache()

    def decode(
        self,
        ids: Tensor,
        mask: Tensor,
        cache: Cache,
        keeper: TraceKeeper | None = None,
        *,
        all_logits: bool = False,
    ) -> Tensor:
        """A causal model's logits of the tokens `ids` [rows, columns], the last column's at least.

        `mask` [rows, cached and present columns] is 0 at padding.
        """
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
        if self._takes_positions:
            inputs["position_ids"] = position_ids(mask)[:, -ids.shape[1] :]
        if self._takes_keep and not all_logits:
            inputs["logits_to_keep"] = 1
        return self._pass(inputs, cache, keeper)

    def routings_of(
        self,
        prompts: Sequence[Sequence[int]],
        prefixes: PrefixStore | None = None,
        asked: Sequence[Sequence[int]] | None = None,
        client: str = "",
        mixture: Mapping[str, float] | None = None,
    ) -> Sequence[PromptRouting | None]:
        """What the model's context finds for each prompt: experts, and where they begin to act.

        None for a model without a context. The router reads what is `asked`, or else the prompts;
        a `mixture` by name stands for its choice. If the base reads the prompts for it and experts
        act from their end on, `prefixes` keeps what was read for the `client`, so that it isn't
        read again. Raises PoolError for unknown names.
        """
        context, count = self._context, len(prompts)
        fixed = mixture_of(mixture, self._parts.experts) if mixture and self._parts else None
        if context is None:
            return [None] * count
        read = [list(each) for each in prompts]
        if fixed is not None:
            return context.routing_of(read, fixed.repeated(count)).each(count)
        questions = read if asked is None else [list(each) for each in asked]
        with ExitStack() as stack:
            if prefixes is not None and context.acting and questions == read:
                base = self._base_key

                def keep(batch: Sequence[Sequence[int]], cache: Cache, mask: Tensor) -> None:
                    for row, prompt in enumerate(batch):
                        reader = Reader(base, len(prompt), client)
                        prefixes.keep(reader, prompt, cache, row, mask[row])

                stack.enter_context(keeping_caches(keep))
            return context.routing_of(read, asked=questions).each(count)

    @property
    def _base_key(self) -> Hashable:
        # Twins of one base have the very same weights.
        return "base", self.model.get_input_embeddings().weight.data_ptr()

    def reader_of(self, prompt: Sequence[int], routed: PromptRouting | None) -> Reader:
        """Who reads the beginning of a prompt: the base, where no expert acts, or this routing."""
        base, limit = self._base_key, len(prompt)
        if self._parts is None:
            return Reader(base, limit)
        acting, choice = self._acting, routed.choice if routed else None
        used = (
            range(len(acting)) if choice is None else sorted(set(choice.experts.flatten().tolist()))
        )
        ends = [acting[z] for z in used if z >= 0]
        if routed is not None and routed.beginnings is not None and self._context is not None:
            columns = [self._context.acting.index(end) for end in ends if end is not None]
            limit = min([limit, *routed.beginnings[0, columns].tolist()])
        if all(end is not None for end in ends):
            return Reader(base, limit)
        return Reader((self._number, None if choice is None else choice.key), limit)

    def use(self, routed: Sequence[PromptRouting | None]) -> None:
        if self._context is not None:
            found = PromptRouting.joined(each for each in routed if each is not None)
            self._context.use(found.choice, found.beginnings)

    def _pass(self, inputs: dict[str, Any], cache: Cache, keeper: TraceKeeper | None) -> Tensor:
        held = {self._cache_name: cache}
        with self._watched(keeper), contiguous_head(self.model):
            logits: Tensor = self.model(**inputs, **held, use_cache=True).logits
        return logits

    def _watched(self, keeper: TraceKeeper | None) -> Any:
        return watch(self.model, keeper.add) if keeper is not None else nullcontext()


class Bases:
    """The loaded bases: weights of the same name or fingerprint are loaded once."""

    def __init__(self) -> None:
        self._loaded: list[tuple[Base, str]] = []

    def get(self, wanted: BaseReference, dtype: str) -> Base:
        dtype = settled_dtype(dtype)
        of_type = [base for base, each in self._loaded if each == dtype]
        named = [b for b in of_type if (b.id, b.revision) == (wanted.id, wanted.revision)]
        if named:
            return named[0]
        base = next((b for b in of_type if b.fingerprint == wanted.fingerprint), None)
        if base is None:
            base = load_base(wanted.id, dtype=dtype, revision=wanted.revision)
        else:  # under another name, and perhaps with another tokenizer
            with suppress(BaseModelError):  # or with none
                tokenizer = load_tokenizer(wanted.id, revision=wanted.revision, offline=True)
                base = replace(base, tokenizer=tokenizer, id=wanted.id, revision=wanted.revision)
        self._loaded.append((base, dtype))  # each tokenizer has a process of its own
        return base


class LoadedModel:
    """An opened model, and what it takes to compose it again; `parts` is None for a base alone."""

    def __init__(self, settings: ServedModel, bases: Bases) -> None:
        self.settings, self._bases = settings, bases
        place, routing = settings.place, settings.routing
        embedder = routing.embedder if routing else None
        if embedder and routing == Routing(embedder=embedder):
            routing = None  # any model may be given an embedder
        if routing or settings.keep or settings.leave_out or settings.scores:
            require_pool(place)
        if settings.routing and settings.routing.router != AUTO:
            check_served(router_of(settings.routing))
        named = BaseReference(settings.base) if settings.base else None
        if is_routed(place):
            self.base = bases.get(named or base_of(place), settings.dtype)
            model = load(place, twin(self.base), embedder=embedder)
        elif is_pool(place):
            self.base = bases.get(named or self.pool.base, settings.dtype)
            model = self._compose(self.pool, settings.routing or Routing())
        else:
            self.base = bases.get(BaseReference(place), settings.dtype)
            model = twin(self.base).model
        if getattr(model, "_is_stateful", False) or model.config.is_encoder_decoder:
            raise BaseModelError(
                f"{self.base.id!r} is an encoder-decoder or keeps more than keys and values; the "
                f"server can't batch such a model and doesn't serve it."
            )
        self.parts = parts = composition_if_any(model)
        self.routing = numbered(parts.routing, len(parts.experts)) if parts else Routing()
        if parts is not None:
            check_served(parts.router)
        self.runner = ModelRunner(model, self.base.tokenizer)

    @cached_property
    def pool(self) -> Pool:
        if not is_pool(self.settings.place):
            raise RoutingError(
                f"{self.settings.name!r} isn't a pool, so its routing can't be changed; serve the "
                f"pool that it was made of."
            )
        opened = Pool.open(self.settings.place)
        return opened.select(self.settings.keep, self.settings.leave_out)

    @property
    def experts(self) -> tuple[str, ...]:
        return self.parts.experts if self.parts else ()

    @property
    def names(self) -> tuple[str, ...]:
        """What stands before the name of an expert, as in MODEL:EXPERT."""
        return self.settings.name, self.base.id

    def reopened(self) -> LoadedModel:
        """The model as its place has it now, over the same base."""
        return LoadedModel(self.settings, self._bases)

    def composed(self, pool: Pool, routing: Routing, others: Sequence[ModelRunner]) -> ModelRunner:
        """The model by another routing; it shares what it can with those of `others`."""
        model = self._compose(pool, routing)
        share_factors(model, [runner.model for runner in others])
        return ModelRunner(model, self.base.tokenizer)

    def _compose(self, pool: Pool, routing: Routing) -> PreTrainedModel:
        return compose(pool, twin(self.base), routing=routing, scores=self.settings.scores)

    def usual(self, pool: Pool) -> str:
        """The router "auto" of these experts."""
        return settled(Routing(AUTO), pool, self.base.model, self.base.tokenizer).router


def load_models(served: Sequence[ServedModel]) -> dict[str, LoadedModel]:
    """All models by name: those of one base share its weights, those of one expert its factors."""
    bases, models = Bases(), dict[str, LoadedModel]()
    for settings in served:
        loaded = LoadedModel(settings, bases)
        share_factors(loaded.runner.model, [each.runner.model for each in models.values()])
        models[settings.name] = loaded
    return models


def share_factors(model: PreTrainedModel, others: Sequence[PreTrainedModel]) -> None:
    """Let `model` use the stacked factors of those of `others` that have the same experts."""
    parts = composition_if_any(model)
    for other in map(composition_if_any, others):
        if parts is None or other is None or other.records != parts.records:
            continue
        for name, layer in parts.layers.items():
            twin_layer = other.layers[name]
            if not isinstance(layer, RoutedLinear) or type(layer) is not type(twin_layer):
                continue
            if layer.stack.dtype == twin_layer.stack.dtype:
                for tensor in layer.stack.tensors():
                    setattr(layer, tensor, getattr(twin_layer, tensor))
