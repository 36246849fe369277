"""The served models, one forward pass of each, and beginnings of prompts that were read before.

All routings over one base share its weights, and those of the same experts their stacked factors.

The next turn of a conversation begins as the one before, and prompts of one application begin with
the same instructions. What a prompt's tokens come to depends on who reads them: the base alone, or
some experts as one routing weighs them. Experts that act from a prompt's end on leave its body to
the base, so for them all one beginning is enough. Each client has its own beginnings: how soon an
answer comes would tell whether others have asked the same.
"""

from __future__ import annotations

import inspect
import itertools
import threading
from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicCache

from ....analysis.traces import TraceKeeper
from ....base.identity import Base, BaseReference, twin
from ....base.loading import load_base, settled_dtype
from ....config import Routing
from ....errors import BaseModelError, RoutingError
from ....experts.pool import Pool
from ....passes import cache_argument
from ....routing.choice import NOBODY, Chosen, PromptRouting
from ....routing.compose import compose, composition_if_any, composition_of, load
from ....routing.conversation import ChatTexts
from ....routing.layers import RoutedLinear
from ....routing.opening import is_pool, is_routed, require_pool
from ....routing.recording import watch
from ....routing.routers.auto import resolved
from ....routing.routers.fixed import mixture_of
from ....routing.routers.prompt import PromptChooser
from ....routing.routers.registry import AUTO
from ....routing.routers.router import check_served, router_of
from ....routing.saved import base_of
from ....sites import positions_of
from ....tasks.batching import contiguous_head, end_tokens, pad_left, position_ids
from ....tasks.encoding import added_tokens
from ..protocol import Fields, Weights
from ..requests import Frame, PreparedRequest
from ..service import left_to_base, numbered, seen_at
from ..settings import ServedModel

Cache: TypeAlias = Any  # DynamicCache; transformers has no types for mypy

SHORTEST = 16  # tokens; fewer are read as fast as they are copied
MIB = 1 << 20
# Transformers' layers of a cache that have keys and values, or nothing.
BATCHED = {"DynamicLayer", "DynamicSlidingWindowLayer", "DummyLayer"}


@dataclass(frozen=True)
class PrefixScope:
    """What prefixes a prompt may share: those of its `key`, over its first `limit` tokens.

    Equal tokens have equal keys and values there. The key has the client, and what reads the
    tokens: the base alone, or some experts by one routing.
    """

    key: Hashable
    limit: int


@dataclass(frozen=True, eq=False)
class Prefix:
    """A prompt's first tokens [n] and each layer's keys and values, [heads, n, d] each.

    Only prompts whose scope has its `key` may use it.
    """

    key: Hashable
    tokens: Tensor
    layers: tuple[tuple[Tensor, Tensor], ...]

    @property
    def nbytes(self) -> int:
        return sum(keys.nbytes + values.nbytes for keys, values in self.layers)

    def shared(self, tokens: Tensor) -> int:
        """How many of the first `tokens` are the same."""
        most = min(len(tokens), len(self.tokens))
        differ = (self.tokens[:most] != tokens[:most]).nonzero()
        return int(differ[0]) if len(differ) else most


class PrefixStore:
    """Prefixes within `most_bytes`; the least recently used leave first. For any thread."""

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes = most_bytes
        self.bytes = 0
        self._prefixes: list[Prefix] = []  # the most recently used last
        self._lock = threading.Lock()

    def find(self, scope: PrefixScope, prompt: Sequence[int]) -> tuple[Prefix | None, int]:
        """The prefix that shares most of the first tokens, and how many; none for hardly any.

        One token is left to be read, since its logits are wanted.
        """
        tokens = torch.tensor(prompt[: min(scope.limit, len(prompt) - 1)])
        with self._lock:
            best: Prefix | None = None
            count = SHORTEST - 1
            for prefix in self._of(scope):
                shared = prefix.shared(tokens)
                if shared > count:
                    best = prefix
                    count = shared
            if best is None:
                return None, 0
            self._prefixes.remove(best)
            self._prefixes.append(best)
        return best, count

    def keep(
        self, scope: PrefixScope, tokens: Sequence[int], cache: Cache, row: int, mask: Tensor
    ) -> None:
        """Keep the first of `tokens`; `mask` [columns] is 1 at theirs in a row of `cache`."""
        count = min(scope.limit, len(tokens))
        if not self.most_bytes or count < SHORTEST:
            return
        kept = torch.tensor(tokens[:count])
        columns = mask.nonzero()[:count, 0]
        with self._lock:
            shorter = []
            for prefix in self._of(scope):
                shared = prefix.shared(kept)
                if shared == count:
                    return
                if shared == len(prefix.tokens):
                    shorter.append(prefix)
            layers = []
            for layer in cache.layers:
                keys = layer.keys[row].index_select(1, columns)
                layers.append((keys, layer.values[row].index_select(1, columns)))
            new = Prefix(scope.key, kept, tuple(layers))
            if new.nbytes > self.most_bytes:
                return
            for prefix in shorter:  # it is in the new one
                self._prefixes.remove(prefix)
                self.bytes -= prefix.nbytes
            self._prefixes.append(new)
            self.bytes += new.nbytes
            while self.bytes > self.most_bytes:
                self.bytes -= self._prefixes.pop(0).nbytes

    def _of(self, scope: PrefixScope) -> list[Prefix]:
        return [prefix for prefix in self._prefixes if prefix.key == scope.key]


def joined(*parts: Tensor) -> Tensor:
    """The rows of all `parts` [rows, .., tokens, n], padded on the left to the longest."""
    longest = max(part.shape[-2] for part in parts)
    return torch.cat([pad(part, (0, 0, longest - part.shape[-2], 0)) for part in parts])


def begin_with(cache: Cache, prefixes: Sequence[Prefix | None], counts: Sequence[int]) -> Tensor:
    """Fill an empty `cache` with a row for each of `prefixes`: so many tokens of it, maybe none.

    Returns the mask [rows, columns] of what is there.
    """
    first = next(filter(None, prefixes), None)
    for layer, sides in enumerate(first.layers if first else ()):
        filled = []
        for side, nothing in enumerate(sides):
            rows = []
            for prefix, count in zip(prefixes, counts, strict=True):
                tensor = prefix.layers[layer][side] if prefix else nothing
                rows.append(tensor[None, :, :count])
            filled.append(joined(*rows))
        cache.update(*filled, layer)
    return pad_left([[1] * n for n in counts], 0)


def unscaled_positions_of(model: PreTrainedModel) -> int | None:
    """`positions_of`, up to where the longest row of a batch changes the rotations of all."""
    rope: Any = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    is_scaled = rope.get("rope_type") == "longrope"
    return rope["original_max_position_embeddings"] if is_scaled else positions_of(model)


_NUMBERS = itertools.count()  # of runners: an id would be used again


class ModelRunner:
    """A model with its tokenizer; each pass adds to a cache and shows its routing to any `keeper`.

    `ends` are the tokens that end an answer.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.device: torch.device = model.device
        self.ends = frozenset(end_tokens(model, tokenizer))
        self.pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        self.vocabulary = int(model.get_input_embeddings().num_embeddings)
        self._arguments = set(inspect.signature(model.forward).parameters)
        self._cache_name = cache_argument(model)
        self._number = next(_NUMBERS)
        self._experts: Sequence[str] = ()
        self._tails: Sequence[int | None] = ()  # read from records once
        self._context = None
        self.chooser: PromptChooser | None = None
        parts = composition_if_any(model)
        if parts is not None:
            self._experts = parts.experts
            self._tails = parts.tails
            self._context = parts.context
            self.chooser = parts.chooser
        self.frame = Frame(
            tokenizer,
            unscaled_positions_of(model),
            looks_prompts_up=self.chooser is not None,
            added=added_tokens(tokenizer, is_encoder_decoder=False),
        )

    def decode(
        self, ids: Tensor, mask: Tensor, cache: Cache, keeper: TraceKeeper | None = None
    ) -> Tensor:
        """Logits [rows, at least one, V] of the last of the tokens `ids` [rows, columns].

        `mask` [rows, cached and present columns] is 0 at padding.
        """
        inputs: Fields = {"input_ids": ids, "attention_mask": mask, self._cache_name: cache}
        if "logits_to_keep" in self._arguments:
            inputs["logits_to_keep"] = 1
        if "position_ids" in self._arguments:
            inputs["position_ids"] = position_ids(mask)[:, -ids.shape[1] :]
        watched = nullcontext() if keeper is None else watch(self.model, keeper.add)
        with watched, contiguous_head(self.model):
            logits: Tensor = self.model(**inputs, use_cache=True).logits
        return logits

    def routings_of(
        self,
        prompts: Sequence[Sequence[int]],
        texts: Sequence[str | Sequence[int] | ChatTexts] | None = None,
        mixture: Weights | None = None,
        **aware: object,
    ) -> Sequence[PromptRouting | None]:
        """What the model's context finds for each prompt: experts, and where they begin to act.

        None for a model without a context. The router reads the `texts`, or else the prompts; a
        `mixture` by name stands for its choice. Of what else it is `aware` (its client, and the
        experts that this one is `allowed`) is for the router. Raises PoolError for unknown names.
        """
        count = len(prompts)
        if self._context is None:
            return [None] * count
        choice = None
        if mixture is not None:
            choice = mixture_of(mixture, self._experts).repeated(count)
        return self._context.routing_of(prompts, choice, texts, **aware).each(count)

    def routed(
        self, prepared: PreparedRequest
    ) -> tuple[Sequence[PromptRouting | None], list[Chosen] | None]:
        """What `routings_of` says of a request's prompts, and their experts, None by token."""
        asked = [prompt.asked for prompt in prepared.prompts]
        tokens = [prompt.tokens for prompt in prepared.prompts]
        aware = {"allowed": prepared.experts, "client": prepared.client}
        routed = self.routings_of(tokens, asked, prepared.mixture, **aware)
        choice = PromptRouting.joined(filter(None, routed)).choice
        if self.chooser is None or choice is None:
            return routed, None
        return routed, self.chooser.explained(choice, asked, **aware)

    def choose(self, prepared: PreparedRequest) -> list[Chosen]:
        return self.routed(prepared)[1] or []

    def prefix_scope(
        self, prompt: Sequence[int], routed: PromptRouting | None, client: str
    ) -> PrefixScope:
        """What a client's prompt may share: where no expert acts, what the base read for it."""
        # Twins of one base have the very same weights.
        weights = self.model.get_input_embeddings().weight.data_ptr()
        choice = None if routed is None else routed.choice
        tails = self._tails
        if choice is not None:
            tails = [tails[z] for z in set(choice.experts.flatten().tolist()) if z != NOBODY]
        limit = max(0, len(prompt) - max(filter(None, tails), default=0))
        if all(tails):
            return PrefixScope((client, ("base", weights)), limit)
        return PrefixScope((client, self._number, choice and choice.key), limit)

    def use(self, routed: Sequence[PromptRouting | None]) -> None:
        if self._context is not None:
            routing = PromptRouting.joined(filter(None, routed))
            self._context.use(routing.choice, routing.lengths)


class LoadedModel:
    """An opened model, and what it takes to compose it again; `parts` is None for a base alone."""

    def __init__(
        self, settings: ServedModel, opened: Callable[..., Base], others: Iterable[LoadedModel] = ()
    ) -> None:
        """`opened` is `load_base`, which remembers what it has loaded; `others` share factors."""
        place = settings.place
        routing = settings.routing
        self.settings = settings
        self._opened = opened
        self.seen = seen_at(place)
        is_bare = routing == routing.of_any_model
        chosen = settings.keep or settings.leave_out or settings.scores or settings.only_better
        if not is_bare or chosen:
            require_pool(place)
        if routing.router != AUTO:
            check_served(router_of(routing))
        base = BaseReference(settings.base or place)
        if not settings.base and (is_routed(place) or is_pool(place)):
            base = base_of(place) if is_routed(place) else self.pool.base
        dtype = settled_dtype(settings.dtype)
        self.base = opened(base.id, dtype=dtype, revision=base.revision)
        if is_routed(place):
            model = load(
                place,
                twin(self.base),
                dtype=dtype,
                embedder=routing.embedder,
                reader=routing.reader,
            )
        elif is_pool(place):
            self.pool = self.pool.measured(routing.reader)
            self.left = left_to_base(settings, self.pool)
            model = self.composed(self.pool, routing).model
        else:
            model = twin(self.base).model
        if not _keeps_keys_and_values(model):
            raise BaseModelError(
                f"{self.base.id!r} is an encoder-decoder, or keeps no keys and values or more than "
                f"these; the server can't batch such a model and doesn't serve it."
            )
        share_factors(model, [other.runner.model for other in others])
        self.bases = (self.base.id,)
        self.experts: tuple[str, ...] = ()
        self.routing = Routing()
        self.parts = parts = composition_if_any(model)
        if parts is not None:
            self.experts = parts.experts
            self.routing = numbered(parts.routing, len(parts.experts))
            check_served(parts.router)
        self.runner: ModelRunner = ModelRunner(model, self.base.tokenizer)
        if settings.only_better and not self.runner.frame.looks_prompts_up:
            raise RoutingError(
                f"--only-better is for routers that choose for whole prompts, but "
                f"{settings.name!r} has {self.routing.router}; leave such experts out instead "
                f"(--leave-out)."
            )
        self.prompts = self.pool.prompts if is_pool(place) else {}

    @cached_property
    def pool(self) -> Pool:
        if not is_pool(self.settings.place):
            raise RoutingError(
                f"{self.settings.name!r} isn't a pool, so its routing can't be changed; serve the "
                f"pool that it was made of."
            )
        opened = Pool.open(self.settings.place)
        return opened.select(self.settings.keep, self.settings.leave_out)

    def reopened(self, others: Iterable[LoadedModel]) -> LoadedModel:
        """The model as its place has it now, over the same base."""
        return LoadedModel(self.settings, self._opened, others)

    def composed(
        self, pool: Pool, routing: Routing, others: Sequence[ModelRunner] = ()
    ) -> ModelRunner:
        """The model by another routing; it shares what it can with those of `others`."""
        model = compose(pool, twin(self.base), routing=routing, scores=self.settings.scores)
        share_factors(model, [runner.model for runner in others])
        context = composition_of(model).context
        if context and context.chooser:
            context.chooser.left = self.left
        return ModelRunner(model, self.base.tokenizer)

    def usual(self, pool: Pool) -> str:
        """The router "auto" of these experts."""
        return resolved(Routing(AUTO), pool, self.base.tokenizer).router


def _keeps_keys_and_values(model: PreTrainedModel) -> bool:
    """Whether a model keeps these of what it has read, and nothing else."""
    layers = {type(layer).__name__ for layer in DynamicCache(config=model.config).layers}
    takes_cache = cache_argument(model) in inspect.signature(model.forward).parameters
    return takes_cache and layers <= BATCHED and not model.config.is_encoder_decoder


def load_models(served: Sequence[ServedModel]) -> dict[str, LoadedModel]:
    """All models by name: those of one base share its weights, those of one expert its factors."""
    opened = cache(load_base)
    models = dict[str, LoadedModel]()
    for settings in served:
        models[settings.name] = LoadedModel(settings, opened, models.values())
    return models


def share_factors(model: PreTrainedModel, others: Sequence[PreTrainedModel]) -> None:
    """Let `model` use the stacked factors of those of `others` that have the same experts."""
    parts = composition_if_any(model)
    for other in map(composition_if_any, others):
        if parts is None or other is None or other.records != parts.records:
            continue
        for name, layer in parts.layers.items():
            twin_layer = other.layers[name]
            if not (isinstance(layer, RoutedLinear) and type(layer) is type(twin_layer)):
                continue
            if layer.stack.dtype == twin_layer.stack.dtype:
                for tensor in layer.stack.tensors():
                    setattr(layer, tensor, getattr(twin_layer, tensor))
