"""Routers that choose for a whole prompt, by its embedding or by what the base makes of it.

The frame of routers that choose experts for a whole input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...base.sites import Site
from ...base.token_masks import (
    cache_of,
    cached_tokens,
    callable_parts,
    given_arguments,
    real_tokens,
)
from ...errors import ConfigError, PoolError, RoutingError
from ...experts.expert import Expert
from ...experts.pool import Pool
from ...tasks.embeddings import PAPER_TEXT, PROMPT, TEXTS, embed_texts, load_embedder, prompt_texts
from ...tasks.prompt_passes import PromptReading, read_prompts
from ...tasks.task import Example
from ..watching import unwatched
from .router import NOBODY, Lookup, Mixtures, Router, RouterSite, RoutingDecision, SiteRouter


class LookedUp(Router):
    """The frame of routers that choose experts for a whole input."""

    @property
    def input_k(self) -> int:
        """How many experts an input gets."""
        return self.k

    @property
    def input_temperature(self) -> float:
        """What divides scores before the softmax."""
        return float(self.config.temperature)

    def at(self, site: RouterSite) -> SiteRouter:
        """The router's module at one site."""
        if site.lookup is None:
            raise RoutingError(f"Router {self.spec.name} has nothing to look experts up in.")
        return LookedUpRouter(site.experts, site.pool_size, site.lookup, site.sees_all)

    def needed(self, tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase:
        """`tokenizer`, which reads prompts. Raises ConfigError when there is none."""
        if tokenizer is None:
            raise ConfigError(
                f"Router {self.spec.name} reads prompts; hand the base over with its tokenizer."
            )
        return tokenizer


class LookedUpRouter(SiteRouter):
    """At one site: the experts that the shared `Lookup` holds for each row, as it weighs them."""

    position: Tensor

    def __init__(
        self, experts: Tensor, pool_size: int, lookup: Lookup, sees_all: bool = True
    ) -> None:
        """`experts` [E] are the pool's indices of the experts that act at the site.

        `sees_all` False says that the site sees some of the rows' tokens only.
        """
        super().__init__()
        self.register_buffer("position", rows_at(experts, pool_size), persistent=False)
        self.lookup, self.sees_all = lookup, sees_all
        self.experts = len(experts)

    def forward(self, u: Tensor) -> RoutingDecision:
        """The decision for u [T, n], with the k of the lookup's mixtures.

        The weight is 0 where an expert of the row does not act at this site, and for NOBODY. Raises
        as `Lookup.of_each` does.
        """
        mixtures = self.lookup.of_each(u, self.sees_all)
        experts = self.position[mixtures.experts]
        return RoutingDecision(experts.clamp(min=0), mixtures.weights * (experts >= 0))

    def distribution(self, u: Tensor) -> Tensor:
        """The weights of the row's experts, else 0, [T, E]; 0 for those absent at this site."""
        decision = self(u)
        zeros = torch.zeros(len(u), self.experts, device=u.device)
        return zeros.scatter_add(1, decision.experts, decision.weights)


def rows_at(experts: Tensor, pool_size: int) -> Tensor:
    """The row in a site's stack of each index in the pool, int64 [pool_size + 1].

    `experts` [E] are the indices of those that act at the site; the others have NOBODY, and so has
    NOBODY itself, which is the last index.
    """
    rows = torch.full((pool_size + 1,), NOBODY)
    rows[experts.cpu()] = torch.arange(len(experts))
    return rows


# -------------------------------------------------------------------------------------------------
# Lookups that choose by prompts: announced ones, or those that pass through the model.
#
# A pass that goes on where an earlier one ended, from its cache or from what its encoder gave, is
# served by the experts of that one's prompt; where nobody has read it, it is refused.
#
# A first pass of assisted decoding holds drafts of the answer after the prompt, and nothing in the
# pass tells them apart for certain. So `generate` of a causal model notes how long its prompt is.
# -------------------------------------------------------------------------------------------------


def _uncompiled(hook: Callable[..., None]) -> Callable[..., None]:
    """`hook`, which torch.compile leaves alone."""
    reason = "Routers that read prompts look at tokens; use fullgraph=False."
    left_alone: Callable[..., None] = torch.compiler.disable(hook, reason=reason)  # type: ignore[no-untyped-call]
    return left_alone


class PromptReader(Lookup):
    """A lookup that chooses by prompts; it reads those that pass where none are announced."""

    name = "this router"

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, k: int = 1, temperature: float = 1.0
    ) -> None:
        """`tokenizer` turns the prompts that pass through the model back into text.

        `k` experts serve an input, weighted by the softmax of their scores over `temperature`.
        """
        super().__init__()
        self.tokenizer, self.k, self.temperature = tokenizer, k, temperature
        self._model: PreTrainedModel | None = None
        self._handles: list[Any] = []
        self._of_caches: WeakKeyDictionary[Any, Mixtures] = WeakKeyDictionary()

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the threads' batches and the caches, which stay with the original."""
        state = super().__getstate__()
        return {name: value for name, value in state.items() if name != "_of_caches"}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        """Restore what `__getstate__` gave."""
        super().__setstate__({**state, "_of_caches": WeakKeyDictionary()})

    def serve(self, mixtures: Mixtures | None) -> None:
        """Use `mixtures` for the rows to come; None goes back to reading prompts."""
        self._turn.mixtures, self._turn.announced = mixtures, mixtures is not None

    def attach(self, model: PreTrainedModel) -> None:
        """Look experts up for every new prompt that `model` is given."""
        self._model = model
        parts = (model.get_encoder(),) if model.config.is_encoder_decoder else callable_parts(model)
        for part in parts:
            self._handles += [
                part.register_forward_pre_hook(self._begin, with_kwargs=True),
                part.register_forward_hook(self._end, always_call=True),
            ]
        if model.config.is_encoder_decoder:
            check = model.register_forward_pre_hook(self._check_encoded, with_kwargs=True)
            self._handles.append(check)
        elif model.can_generate():
            model.generate = partial(_generate, self, model)

    def detach(self) -> None:
        """Stop reading prompts."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._model is not None:
            vars(self._model).pop("generate", None)  # the model's own is its class's
        self._model = None

    @_uncompiled
    def _begin(self, part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        turn = self._turn
        depth = 1 if part is self._model else turn.depth + 1  # whatever broke off before
        if depth == 1 and not turn.announced:
            self._read(given_arguments(part, args, kwargs))  # may call the model itself
        turn.depth = depth

    @_uncompiled
    def _end(self, part: nn.Module, _: Any, output: Any) -> None:
        turn = self._turn
        if turn.depth == 1 and output is not None and turn.mixtures is not None:
            if part is not self._model:  # the encoder, or else nobody will look at it
                turn.encoded, turn.checked = output[0], None
            for cache in filter(_is_cache, _values(output)):
                self._of_caches[cache] = turn.mixtures
        turn.depth = max(0, turn.depth - 1)

    @_uncompiled
    def _check_encoded(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Raise RoutingError for encoder outputs of other prompts than those read last."""
        turn, given = self._turn, given_arguments(model, args, kwargs).get("encoder_outputs")
        if given is None or turn.announced or given[0] is turn.checked:
            return
        if turn.encoded is None or not _is_same(given[0], turn.encoded):
            raise RoutingError(
                f"Router {self.name} chooses by the prompts that the encoder read last, and these "
                f"encoder_outputs are those of others; pass input_ids in their place."
            )
        turn.checked = given[0]

    def _read(self, given: Mapping[str, Any]) -> None:
        """Find the experts of the prompts in a call's arguments, unless it goes on with others."""
        ids, turn, cache = given.get("input_ids"), self._turn, cache_of(given)
        known, cached = _is_cache(cache) and cache in self._of_caches, cached_tokens(given)
        if known if cached is None else cached > 0:
            turn.mixtures = self._of_cache(cache)
            return
        if given.get("cu_seq_lens_q") is not None:
            raise RoutingError(
                f"Router {self.name} reads whole inputs, but several share a row here (continuous "
                f"batching); use generate with a padded batch."
            )
        if ids is None:
            raise RoutingError(f"Router {self.name} reads the input's tokens; pass input_ids.")
        if given.get("use_cache") is not False or not self._grew(ids):
            end, real = self._prompt_end(given), real_tokens(given)
            real = torch.ones_like(ids).bool() if real is None else real
            kept = zip(ids[:, :end], real[:, :end], strict=True)
            turn.mixtures = self.find([row[keep].tolist() for row, keep in kept])
            turn.prompt, turn.given = ids.cpu(), None
        turn.length = ids.shape[1]

    def _prompt_end(self, given: Mapping[str, Any]) -> int:
        """How many columns of a first pass are its prompt; drafts of assisted decoding follow it.

        Raises RoutingError where the pass doesn't say, or holds a part of the prompt only.
        """
        columns, prompt = given["input_ids"].shape[1], self._turn.given
        kept = given.get("logits_to_keep")  # with drafts, generate keeps one more than there are
        kept = kept if isinstance(kept, int) and kept else None  # 0 keeps all
        drafts = columns - prompt if prompt is not None else (kept or 1) - 1
        if drafts == 0 or (prompt is not None and drafts > 0 and kept in (None, drafts + 1)):
            return int(columns - drafts)
        if prompt is None:
            raise RoutingError(
                f"Router {self.name} reads whole prompts, and can't say where this one ends: the "
                f"pass keeps {kept} logits (logits_to_keep), as if drafts of an answer followed. "
                f"Call the model's own generate, or leave logits_to_keep out."
            )
        raise RoutingError(
            f"Router {self.name} reads whole prompts: generate was given one of {prompt} tokens, "
            f"and its first pass has {columns}. Leave out what cuts or changes prompts "
            f"(prefill_chunk_size, token_healing)."
        )

    def _of_cache(self, cache: Any) -> Mixtures:
        """The experts of the prompt that `cache` holds."""
        known = self._of_caches.get(cache)
        if known is None:
            raise RoutingError(
                f"Router {self.name} reads whole prompts, and has not read the one in this cache "
                f"(a copy is another cache); pass the whole prompt without a cache."
            )
        return known

    def _grew(self, ids: Tensor) -> bool:
        """True for the prompt read last, a token longer: a step of generation without a cache."""
        prompt = self._turn.prompt
        if prompt is None or ids.shape != (len(prompt), self._turn.length + 1):
            return False
        return torch.equal(ids[:, : prompt.shape[1]].cpu(), prompt)


def _generate(
    reader: PromptReader, model: PreTrainedModel, inputs: Any = None, *args: Any, **kwargs: Any
) -> Any:
    """What the class of `model` generates, while `reader` knows how long the prompt is."""
    turn, given = reader._turn, kwargs.get("input_ids") if inputs is None else inputs
    before = turn.given  # of a call around this one: the model may be its own assistant
    turn.given = given.shape[1] if isinstance(given, Tensor) and given.dim() == 2 else None
    turn.prompt = None  # what comes first is a new prompt
    try:
        return type(model).generate(model, inputs, *args, **kwargs)
    finally:
        turn.given = before


def _values(output: Any) -> Iterable[Any]:
    """What a model gave back, one by one."""
    if isinstance(output, Mapping):
        return output.values()
    return output if isinstance(output, tuple) else ()


def _is_cache(value: Any) -> bool:
    return hasattr(value, "get_seq_length")


def _is_same(given: Tensor, encoded: Tensor) -> bool:
    """True where `given` is `encoded` [rows, tokens, d], or each of its rows several times.

    One place tells: an encoder's every output depends on the whole prompt.
    """
    times, rest = divmod(len(given), len(encoded))
    first = encoded[:, 0].repeat_interleave(times, dim=0).to(given)
    return rest == 0 and torch.equal(given[:, 0], first)


# -------------------------------------------------------------------------------------------------
# The frame of lookups that compare a prompt's embedding with those of training inputs.
# -------------------------------------------------------------------------------------------------

MOST_CHARACTERS = 1 << 20  # a model of 100,000 tokens of context is given fewer


class PromptEmbedder:
    """Embeds prompts as the training inputs of experts were."""

    def __init__(self, name: str, columns: int) -> None:
        """The embedder's `name`, and how many `columns` the experts' embeddings have.

        Loads it, so that composing a model waits for that, and not the first prompt. Raises
        ConfigError.
        """
        load_embedder(name)
        self.name, self.columns = name, columns

    def vectors(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors [texts, columns].

        Raises RoutingError for a text of more than MOST_CHARACTERS, which only a tokenizer that
        means harm makes of a prompt's tokens, where vectors have another number of columns, and as
        `embed_texts` does.
        """
        longest = max(map(len, texts), default=0)
        if longest > MOST_CHARACTERS:
            raise RoutingError(
                f"The base's tokenizer makes {longest} characters of a prompt's tokens, more than "
                f"the {MOST_CHARACTERS} that are embedded; use a router without an embedder."
            )
        found = embed_texts(texts, self.name)
        if found.shape[1] != self.columns:
            raise RoutingError(
                f"The experts' embeddings have {self.columns} columns, those of {self.name} "
                f"{found.shape[1]}; they are another embedder's."
            )
        return found


class EmbeddingReader(PromptReader):
    """A lookup that goes by the embedding of each prompt; subclasses say how, in `nearest_to`."""

    def __init__(
        self,
        embedder: str,
        columns: int,
        tokenizer: PreTrainedTokenizerBase,
        k: int = 1,
        temperature: float = 1.0,
    ) -> None:
        """`embedder` made what prompts are compared with, which has so many `columns`.

        All else is as `PromptReader` takes it. Raises as `PromptEmbedder` does.
        """
        super().__init__(tokenizer, k, temperature)
        self.prompts = PromptEmbedder(embedder, columns)

    @property
    def embedder(self) -> str:
        """The embedder's name."""
        return self.prompts.name

    def nearest_to(self, queries: Tensor) -> Mixtures:
        """The experts for inputs with these embeddings, unit vectors [texts, columns]."""
        raise NotImplementedError

    def info(self) -> dict[str, Any]:
        """The embedder's name, and what it embedded."""
        return {"embedder": self.embedder, "embedding_form": PROMPT}

    def find(
        self, prompts: Sequence[Sequence[int]], examples: Sequence[Example] | None = None
    ) -> Mixtures:
        """The experts of each prompt."""
        return self.nearest_to(self.prompts.vectors(prompt_texts(self.tokenizer, prompts)))


@dataclass(frozen=True)
class Embeddings:
    """Unit vectors of training inputs, `rows` [M, dims], by `embedder`, and their experts [M]."""

    rows: Tensor
    owners: Tensor
    embedder: str


def embeddings_of(pool: Pool, embedder: str | None = None, form: str = PROMPT) -> Embeddings:
    """Those of all experts of `pool`; `owners` are indices in it.

    Raises PoolError when an expert has none or has those of other texts than `form` says, or when
    they come from several embedders, or from another than `embedder`.
    """
    rows = [_embeddings(expert, form) for expert in pool.experts]
    kinds = {
        (str(expert.info.embedder), row.shape[1])
        for expert, row in zip(pool.experts, rows, strict=True)
    }
    if len(kinds) > 1:
        raise PoolError(
            f"The experts' embeddings come from several embedders and can't be compared: {kinds}."
        )
    found = kinds.pop()[0]
    if embedder not in (None, found):
        raise PoolError(f"The experts' embeddings come from {found}, those there from {embedder}.")
    owners = torch.arange(len(rows)).repeat_interleave(torch.tensor([len(row) for row in rows]))
    unit = torch.nn.functional.normalize(torch.cat(rows).float(), dim=-1)
    return Embeddings(unit, owners, found)


def _embeddings(expert: Expert, form: str) -> Tensor:
    if expert.embeddings is None or expert.info.embedder is None:
        lacks = "embeddings" if expert.embeddings is None else "record of its embedder"
        raise PoolError(
            f"Expert {expert.name!r} has no {lacks}; run 'phatgoose measure' on it, with "
            f"--task its data, or leave it out."
        )
    found = expert.info.embedding_form or PAPER_TEXT  # before it was recorded
    if found != form:
        flag = "" if form == PROMPT else f" --embedding-form {form}"
        raise PoolError(
            f"Expert {expert.name!r} has embeddings of {TEXTS.get(found, found)}, but this router "
            f"compares {TEXTS[form]}; measure them again: phatgoose measure {expert.directory} "
            f"--task ITS-DATA --embeddings --no-means --no-readings{flag}"
        )
    return expert.embeddings


# -------------------------------------------------------------------------------------------------
# The frame of lookups that go by what the base alone makes of a prompt.
# -------------------------------------------------------------------------------------------------


class BaseReader(PromptReader):
    """A lookup that scores experts by activations of the base.

    Every prompt passes through the model once with no expert at work, before it passes with its
    experts. Subclasses say in `reading` what is taken from that pass; it gives a score for each
    expert.
    """

    def reading(self, model: PreTrainedModel) -> PromptReading:
        """What reads the passes of one call; it finds scores [texts, pool_size]."""
        raise NotImplementedError

    def mixed(self, scores: Tensor) -> Mixtures:
        """The experts for `scores` [texts, pool_size]: as `Mixtures.best` has it."""
        return Mixtures.best(scores, self.k, self.temperature)

    def find(
        self, prompts: Sequence[Sequence[int]], examples: Sequence[Example] | None = None
    ) -> Mixtures:
        """The experts of each prompt. Raises RoutingError when not attached."""
        return self.mixed(self.scores(prompts))

    def scores(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """The score of each prompt and expert, float32 [prompts, pool_size]."""
        return self._read_alone(prompts, self.reading(self._attached))

    @property
    def _attached(self) -> PreTrainedModel:
        if self._model is None:
            raise RoutingError(f"Router {self.name} reads prompts with a model; compose one.")
        return self._model

    def _read_alone(self, prompts: Sequence[Sequence[int]], reading: PromptReading) -> Tensor:
        """What `reading` finds in each prompt, read by the base without any expert."""
        with self._base_alone(), unwatched():
            return read_prompts(self._attached, prompts, reading)

    @contextmanager
    def _base_alone(self) -> Iterator[None]:
        """No expert acts in the passes of this thread while the context is open."""
        mixtures, announced = self._turn.mixtures, self._turn.announced
        self.serve(Mixtures.alone(torch.tensor([NOBODY])))
        try:
            yield
        finally:
            self._turn.mixtures, self._turn.announced = mixtures, announced


def routed_sites(model: PreTrainedModel, names: Iterable[str]) -> dict[str, Site]:
    """The sites of these names of a routed `model`."""
    layers: Mapping[str, Any] = {name: model.get_submodule(name) for name in names}
    return {name: layer.site for name, layer in layers.items()}


# -------------------------------------------------------------------------------------------------
# What the base makes of prompts, kept for other routers that read the same of that base.
# -------------------------------------------------------------------------------------------------

MOST_BYTES = 2**30  # some 7,000 prompts of a base of 30 blocks of 576 numbers

Prompt = tuple[int, ...]  # its tokens


class RememberedStates:
    """States by prompt, as `experts.readings.PromptStates` has them, up to `most_bytes` of them.

    Prompts that came when there was no more room are read again each time.
    """

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self._left = most_bytes
        self._states: dict[Prompt, Tensor] = {}

    def of(
        self, prompts: Sequence[Sequence[int]], read: Callable[[Sequence[Prompt]], Tensor]
    ) -> Tensor:
        """The states [prompts, ..] of prompts given by their tokens.

        `read` finds those of the ones that aren't known, each once.
        """
        asked = [tuple(prompt) for prompt in prompts]
        new = [prompt for prompt in dict.fromkeys(asked) if prompt not in self._states]
        found = dict(zip(new, read(new), strict=True)) if new else {}
        for prompt, states in found.items():
            if states.nbytes <= self._left:
                self._left -= states.nbytes
                self._states[prompt] = states.clone()  # not a view, which would keep all
        known = self._states
        return torch.stack([known[each] if each in known else found[each] for each in asked])
