"""The served models, and one forward pass of each.

All routings over one base share its weights, and those of the same experts their stacked factors.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Hashable, Iterable, Mapping, Sequence
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import replace
from functools import cached_property
from typing import Any, TypeAlias

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import BaseModelOutput

from ....analysis.traces import TraceKeeper
from ....base import Base, BaseReference, load_base, load_tokenizer, settled_dtype, twin
from ....config import Routing
from ....errors import BaseModelError, RoutingError
from ....experts.pool import Pool
from ....passes import ActsOn, cache_argument
from ....routing.choices import PromptRouting
from ....routing.compose import compose
from ....routing.composition import composition_if_any
from ....routing.layers import RoutedLinear
from ....routing.open_model import is_pool, is_routed, require_pool
from ....routing.recording import watch
from ....routing.routers.automatic import settled
from ....routing.routers.fixed import mixture_of
from ....routing.routers.registry import AUTO
from ....routing.routers.router import check_served, router_of
from ....routing.saved import HASHES, base_of, load
from ....sites import positions_of
from ....tasks.batching import contiguous_head, position_ids
from ....tasks.encoding import added_tokens
from ....tasks.prompt_passes import end_tokens, keeping_caches
from ..protocol import RoutingOverride
from ..settings import ServedModel
from .prefixes import PrefixStore, Reader

Cache: TypeAlias = Any  # DynamicCache or EncoderDecoderCache; transformers has no types for mypy


_NUMBERS = itertools.count()  # of runners: an id would be used again


class ModelRunner:
    """A model with its tokenizer; each pass adds to a cache and shows its routing to any `keeper`.

    `ends` are the tokens that end an answer, `context` how many tokens the model (or its encoder)
    can hold, None for any, `added` those before and after the text of a prompt.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.is_encoder_decoder = bool(model.config.is_encoder_decoder)
        self.ends = frozenset(end_tokens(model, tokenizer))
        self.pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        self.positions = positions_of(model)
        self.context = self.positions.prompt or self.positions.trained
        self.added = added_tokens(tokenizer, is_encoder_decoder=self.is_encoder_decoder)
        self.vocabulary = int(model.get_input_embeddings().num_embeddings)
        known = inspect.signature(model.forward).parameters
        self._takes_positions = "position_ids" in known
        self._takes_keep = "logits_to_keep" in known
        self._cache_name = cache_argument(model)
        self._parts = parts = composition_if_any(model)
        self._context = parts.context if parts else None
        self._acting = parts.acting if parts else ()  # read from records once
        self._number = next(_NUMBERS)

    @property
    def device(self) -> torch.device:
        device: torch.device = self.model.device
        return device

    def new_cache(self) -> Cache:
        if self.is_encoder_decoder:
            return EncoderDecoderCache(DynamicCache(), DynamicCache())
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

    def answer(
        self,
        ids: Tensor,
        mask: Tensor,
        encoded: BaseModelOutput,
        cache: Cache,
        keeper: TraceKeeper | None = None,
    ) -> Tensor:
        """An encoder-decoder model's logits of the decoder's tokens `ids` [rows, 1]."""
        inputs = {"decoder_input_ids": ids, "attention_mask": mask, "encoder_outputs": encoded}
        return self._pass(inputs, cache, keeper)

    def encode(
        self, ids: Tensor, mask: Tensor, keeper: TraceKeeper | None = None
    ) -> BaseModelOutput:
        with self._watched(keeper):
            found: BaseModelOutput = self.model.get_encoder()(input_ids=ids, attention_mask=mask)
        return found

    @property
    def looks_prompts_up(self) -> bool:
        return self._context is not None and self._context.router is not None

    @cached_property
    def in_chats(self) -> bool:
        return self._parts is not None and self._parts.in_chats

    def routings_of(
        self,
        prompts: Sequence[Sequence[int]],
        prefixes: PrefixStore | None = None,
        asked: Sequence[Sequence[int]] | None = None,
        client: str = "",
    ) -> Sequence[PromptRouting | None]:
        """What the model's context finds for each prompt: experts, and where they begin to act.

        None for a model without a context. The router reads what is `asked`, or else the prompts.
        If the base reads these for it and experts act from their end on, `prefixes` keeps what was
        read for the `client`, so that it isn't read again.
        """
        if self._context is None:
            return [None] * len(prompts)
        read = [list(each) for each in prompts]
        questions = read if asked is None else [list(each) for each in asked]
        with ExitStack() as stack:
            if prefixes is not None and self._context.acting and questions == read:
                base = self._base_key

                def keep(batch: Sequence[Sequence[int]], cache: Cache, mask: Tensor) -> None:
                    for row, prompt in enumerate(batch):
                        reader = Reader(base, len(prompt), client)
                        prefixes.keep(reader, prompt, cache, row, mask[row])

                stack.enter_context(keeping_caches(keep))
            found = self._context.routing_of(read, asked=questions)
        return found.each(len(prompts))

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

    def mixed(
        self, weights: Mapping[str, float], prompts: Sequence[Sequence[int]]
    ) -> Sequence[PromptRouting | None]:
        """`routings_of` with a request's own mixture. Raises PoolError for unknown names."""
        mixture = mixture_of(weights, self._parts.experts if self._parts else ())
        if self._context is None:
            return [None] * len(prompts)
        found = self._context.routing_of(prompts, mixture.repeated(len(prompts)))
        return found.each(len(prompts))

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


class _Bases:
    def __init__(self) -> None:
        self._loaded: list[tuple[Base, str]] = []

    def get(self, wanted: BaseReference, dtype: str) -> Base:
        """The base `wanted` in `dtype`; weights of the same name or fingerprint are loaded once."""
        dtype = settled_dtype(dtype)
        for base, of in self._loaded:
            if of == dtype and (base.id, base.revision) == (wanted.id, wanted.revision):
                return base
        for base, of in self._loaded:
            # The same weights under another name may have another tokenizer.
            if of == dtype and base.fingerprint == wanted.fingerprint:
                with suppress(BaseModelError):  # no tokenizer there
                    tokenizer = load_tokenizer(wanted.id, revision=wanted.revision, offline=True)
                    base = replace(
                        base, tokenizer=tokenizer, id=wanted.id, revision=wanted.revision
                    )
                    self._loaded.append((base, dtype))  # each tokenizer has a process of its own
                return base
        base = load_base(wanted.id, dtype=dtype, revision=wanted.revision)
        self._loaded.append((base, dtype))
        return base


class LoadedModel:
    """An opened model, and what it takes to compose it again; `parts` is None for a base alone."""

    def __init__(self, settings: ServedModel, bases: _Bases) -> None:
        self.settings, self._bases = settings, bases
        self._check()
        place = settings.place
        named = BaseReference(settings.base) if settings.base else None
        if is_routed(place):
            self.base = bases.get(named or base_of(place), settings.dtype)
            model = load(place, twin(self.base), embedder=self._embedder)
        elif is_pool(place):
            self.base = bases.get(named or self.pool.base, settings.dtype)
            model = self.compose(self.pool, settings.routing or Routing())
        else:
            self.base = bases.get(BaseReference(place), settings.dtype)
            model = twin(self.base).model
        self.parts = composition_if_any(model)
        self.routing = Routing()
        if self.parts is not None:
            self.routing = numbered(self.parts.routing, len(self.parts.experts))
        if getattr(model, "_is_stateful", False):
            raise BaseModelError(
                f"{self.base.id!r} keeps more state than keys and values; the server can't batch "
                f"such a model and doesn't serve it."
            )
        if self.parts is not None:
            check_served(self.parts.router)
        self.runner = ModelRunner(model, self.base.tokenizer)

    def _check(self) -> None:
        settings = self.settings
        routing = settings.routing
        if self._embedder and routing == Routing(embedder=self._embedder):
            routing = None  # any model may be given an embedder
        if routing or settings.keep or settings.leave_out or settings.scores:
            require_pool(settings.place)
        if settings.routing and settings.routing.router != AUTO:
            check_served(router_of(settings.routing))

    @property
    def _embedder(self) -> str | None:
        return self.settings.routing.embedder if self.settings.routing else None

    @cached_property
    def pool(self) -> Pool:
        if is_routed(self.settings.place):
            raise RoutingError(
                f"{self.settings.name!r} is a saved model; its routing can be changed only while a "
                f"pool with its experts, as they were when it was saved, is served beside it "
                f"(phatgoose serve MODEL POOL)."
            )
        opened = Pool.open(self.settings.place)
        return opened.select(self.settings.keep, self.settings.leave_out)

    def reopened(self) -> LoadedModel:
        """The model as its place has it now, over the same base."""
        return LoadedModel(self.settings, self._bases)

    def find_experts(self, models: Iterable[LoadedModel]) -> None:
        """Take a saved model's experts from the first pool of `models` that has all of them."""
        # The places that its own file names are not the operator's: they are neither opened nor
        # fetched.
        if self.parts is None or not is_routed(self.settings.place):
            return
        wanted = [_identity(record) for record in self.parts.records]
        for pool in [each.pool for each in models if is_pool(each.settings.place)]:
            identities = map(_identity, pool.records())
            held = dict(zip(identities, pool.experts, strict=True))
            if all(identity in held for identity in wanted):
                self.pool = Pool(tuple(held[identity] for identity in wanted))
                return

    def compose(self, pool: Pool, routing: Routing) -> PreTrainedModel:
        scores = self.settings.scores
        return compose(pool, twin(self.base), routing=routing, scores=scores)

    @property
    def experts(self) -> tuple[str, ...]:
        return self.parts.experts if self.parts else ()

    def composed(self, pool: Pool, routing: Routing, others: Sequence[ModelRunner]) -> ModelRunner:
        """The model by another routing; it shares what it can with those of `others`."""
        model = self.compose(pool, routing)
        share_factors(model, [runner.model for runner in others])
        return ModelRunner(model, self.base.tokenizer)

    def overridden(self, override: RoutingOverride) -> tuple[Routing, Pool]:
        """The routing and the experts with `override` applied, or what makes that impossible."""
        if self.parts is None:
            raise RoutingError(f"{self.settings.name!r} is a base model alone; it has no experts.")
        pool = self.pool.select(override.keep, override.leave_out)
        if override.router == AUTO:
            usual = settled(Routing(AUTO), pool, self.base.model, self.base.tokenizer)
            override = replace(override, router=usual.router)
        return overridden(self.routing, self.settings, override, len(pool)), pool


def overridden(
    routing: Routing, settings: ServedModel, override: RoutingOverride, experts: int
) -> Routing:
    """`routing` with `override` applied, for this many experts. Raises ConfigError."""
    if override.router not in (None, routing.router):  # whose k needn't suit another router
        asked = settings.routing.k if settings.routing else None
        routing = replace(routing, router=override.router, k=asked)
    if override.k is not None:
        routing = replace(routing, k=override.k)
    check_served(router_of(routing))
    return numbered(routing, experts)


def numbered(routing: Routing, experts: int) -> Routing:
    """`routing` with the k that results among this many experts; equal ones compare equal."""
    router = router_of(routing)
    return replace(router.routing, k=min(router.k, experts) or None)


def _identity(record: Mapping[str, Any]) -> tuple[object, ...]:
    return (*(record.get(key) for key in ("name", *HASHES)), ActsOn.of(record.get("acts_on")))


def load_models(served: Sequence[ServedModel]) -> dict[str, LoadedModel]:
    """All models by name: those of one base share its weights, those of one expert its factors."""
    bases = _Bases()
    models: dict[str, LoadedModel] = {}
    for settings in served:
        loaded = LoadedModel(settings, bases)
        share_factors(loaded.runner.model, [each.runner.model for each in models.values()])
        models[settings.name] = loaded
    for loaded in models.values():
        loaded.find_experts(models.values())
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
