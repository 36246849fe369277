"""The routing context of a model: which experts act on each row of the present batch.

All sites of a model whose router chooses for whole prompts share one. `composition.routing_for`
announces prompts to it; it reads those that pass unannounced by itself, in hooks of the model.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedModel

from ..base.sites import ROUTED
from ..base.token_masks import (
    cache_of,
    cached_tokens,
    callable_parts,
    given_arguments,
    real_tokens,
)
from ..errors import RoutingError
from .watching import unwatched

NOBODY = -1  # stands among experts for none: the base's own output


@dataclass(frozen=True)
class Choice:
    """The experts of some prompts: `experts` [rows, k], the pool's indices, best first.

    `weights` [rows, k], float32, say how much each adds. Most rows have one expert of weight 1.
    """

    experts: Tensor
    weights: Tensor

    @classmethod
    def alone(cls, experts: Tensor) -> Choice:
        """Each of `experts` [rows] alone, with the weight 1; NOBODY is the base."""
        return cls(experts[:, None], torch.ones(len(experts), 1, device=experts.device))

    @classmethod
    def joined(cls, parts: Iterable[Choice]) -> Choice:
        """The rows of all `parts` in turn; where k differs, NOBODY fills rows up."""
        held = list(parts)
        k = max((part.experts.shape[1] for part in held), default=0)
        missing = [(0, k - part.experts.shape[1]) for part in held]
        pairs = list(zip(held, missing, strict=True))
        experts = [pad(part.experts, room, value=NOBODY) for part, room in pairs]
        return cls(torch.cat(experts), torch.cat([pad(part.weights, room) for part, room in pairs]))

    def lone(self) -> Tensor | None:
        """The expert of each row [rows], where each has one of weight 1; else None."""
        alone = self.experts.shape[1] == 1 and bool((self.weights == 1).all())
        return self.experts[:, 0] if alone and bool((self.experts >= 0).all()) else None

    def named(self, names: Sequence[str]) -> list[dict[str, float]]:
        """For each row its experts' weights by name, best first; `names` are the pool's."""
        rows = zip(self.experts.tolist(), self.weights.tolist(), strict=True)
        return [
            {names[z]: weight for z, weight in zip(experts, weights, strict=True)}
            for experts, weights in rows
        ]

    def __len__(self) -> int:
        return len(self.experts)

    def repeated(self, rows: int) -> Choice:
        """So many rows of this one."""
        return Choice(self.experts.repeat(rows, 1), self.weights.repeat(rows, 1))

    def of(self, rows: Sequence[int]) -> Choice:
        return Choice(self.experts[list(rows)], self.weights[list(rows)])

    def each(self) -> list[Choice]:
        return [self.of([row]) for row in range(len(self))]


class Chooser(Protocol):
    """What a context asks: a `routers.prompt_router.PromptRouter`."""

    name: str
    k: int
    unserved: str | None

    def choose(
        self,
        prompts: Sequence[Sequence[int]],
        base: PreTrainedModel | None = None,
        **known: Any,
    ) -> Choice: ...


class _Present(threading.local):
    choice: Choice | None = None  # as `RoutingContext.choice`
    announced = False  # by somebody, rather than read
    prompt: Tensor | None = None  # read last
    length = 0  # of that prompt by now
    given: int | None = None  # columns of the prompt that `generate` was given, until it is read
    depth = 0  # of calls inside calls of the model
    encoded: Tensor | None = None  # what the encoder made of the prompts read last
    checked: Tensor | None = None  # encoder outputs found to be those


def _uncompiled(hook: Callable[..., None]) -> Callable[..., None]:
    reason = "Routers that read prompts look at tokens; use fullgraph=False."
    left_alone: Callable[..., None] = torch.compiler.disable(hook, reason=reason)  # type: ignore[no-untyped-call]
    return left_alone


class RoutingContext:
    """Which experts act on each row of the present batch; every thread has a batch of its own.

    A pass that goes on where an earlier one ended, from its cache or from what its encoder gave, is
    served by the experts of that one's prompt; where nobody has read it, it is refused. A first
    pass of assisted decoding holds drafts of the answer after the prompt, and nothing in the pass
    tells them apart for certain: so `generate` of a causal model notes how long its prompt is.
    """

    def __init__(self, router: Chooser) -> None:
        self.router = router
        self._model: PreTrainedModel | None = None
        self._handles: list[Any] = []
        self._begin_anew()

    def _begin_anew(self) -> None:
        self._present = _Present()
        # Weak: a cache that its owner drops takes its choice along.
        self._of_caches: WeakKeyDictionary[Any, Choice] = WeakKeyDictionary()

    def __getstate__(self) -> dict[str, Any]:
        own = ("_present", "_of_caches")
        return {name: value for name, value in self.__dict__.items() if name not in own}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin_anew()

    @property
    def choice(self) -> Choice | None:
        """The experts of this thread's rows, or of all as one row; None if unknown."""
        return self._present.choice

    def use(self, choice: Choice | None) -> None:
        """Use `choice` for the rows of the passes to come; None goes back to reading prompts."""
        self._present.choice, self._present.announced = choice, choice is not None

    def choose(self, prompts: Sequence[Sequence[int]], **known: Any) -> Choice:
        return self.router.choose(prompts, self._model, **known)

    def of_each(self, u: Tensor, sees_all: bool = True) -> Choice:
        """The experts of each token of u [T, n], on its device: T / rows tokens in turn.

        `sees_all` False: u holds some rows' tokens only, so all rows must have the same experts.
        Raises RoutingError when no expert is known, T is no multiple of the rows, or rows differ.
        """
        known = self.choice
        if known is None:
            raise RoutingError(
                self.router.unserved or "Nothing has told the router yet what its inputs are."
            )
        if not sees_all:
            known = _of_any(known)
        if len(u) % len(known):
            raise RoutingError(f"{len(u)} tokens can't be shared out to {len(known)} inputs.")
        count = len(u) // len(known)
        return Choice(
            known.experts.to(u.device).repeat_interleave(count, dim=0),
            known.weights.to(u.device).repeat_interleave(count, dim=0),
        )

    def attach(self, model: PreTrainedModel) -> None:
        """Read every new prompt that `model` is given, if the router can go by prompts alone."""
        self._model = model
        if self.router.unserved:
            return
        # Generation calls the encoder by itself, and a decoder never sees the prompt.
        parts = (model.get_encoder(),) if model.config.is_encoder_decoder else callable_parts(model)
        for part in parts:
            self._handles += [
                part.register_forward_pre_hook(self._begin, with_kwargs=True),
                # Also after a pass that raised, so that depth is right again.
                part.register_forward_hook(self._end, always_call=True),
            ]
        if model.config.is_encoder_decoder:
            check = model.register_forward_pre_hook(self._check_encoded, with_kwargs=True)
            self._handles.append(check)
        elif model.can_generate():
            # On the instance, over the class's own; detach takes it away again.
            model.generate = partial(_generate, self, model)

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._model is not None:
            vars(self._model).pop("generate", None)  # the model's own is its class's
        self._model = None

    @_uncompiled
    def _begin(self, part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        present = self._present
        # Parts call each other: only the outermost call's arguments are the caller's.
        depth = 1 if part is self._model else present.depth + 1  # whatever broke off before
        if depth == 1 and not present.announced:
            self._read(given_arguments(part, args, kwargs))  # may call the model itself
        present.depth = depth

    @_uncompiled
    def _end(self, part: nn.Module, _: Any, output: Any) -> None:
        present = self._present
        if present.depth == 1 and output is not None and present.choice is not None:
            if part is not self._model:  # the encoder, or else nobody will look at it
                present.encoded, present.checked = output[0], None
            for cache in filter(_is_cache, _values(output)):
                self._of_caches[cache] = present.choice
        present.depth = max(0, present.depth - 1)

    @_uncompiled
    def _check_encoded(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        present, given = self._present, given_arguments(model, args, kwargs).get("encoder_outputs")
        if given is None or present.announced or given[0] is present.checked:
            return
        if present.encoded is None or not _is_same(given[0], present.encoded):
            raise RoutingError(
                f"Router {self.router.name} chooses by the prompts that the encoder read last, and "
                f"these encoder_outputs are those of others; pass input_ids in their place."
            )
        present.checked = given[0]

    def _read(self, given: Mapping[str, Any]) -> None:
        ids, present, cache = given.get("input_ids"), self._present, cache_of(given)
        known, cached = _is_cache(cache) and cache in self._of_caches, cached_tokens(given)
        # It goes on with prompts that were read before. Caches of states alone don't tell their
        # length; then any that is known counts.
        if known if cached is None else cached > 0:
            present.choice = self._of_cache(cache)
            return
        name = self.router.name
        if given.get("cu_seq_lens_q") is not None:
            raise RoutingError(
                f"Router {name} reads whole inputs, but several share a row here (continuous "
                f"batching); use generate with a padded batch."
            )
        if ids is None:
            raise RoutingError(f"Router {name} reads the input's tokens; pass input_ids.")
        if given.get("use_cache") is not False or not self._grew(ids):
            end, real = self._prompt_end(given), real_tokens(given)
            real = torch.ones_like(ids).bool() if real is None else real
            kept = zip(ids[:, :end], real[:, :end], strict=True)
            # Padding is left out, so a prompt's choice doesn't depend on its batch.
            present.choice = self.choose([row[keep].tolist() for row, keep in kept])
            present.prompt, present.given = ids.cpu(), None
        present.length = ids.shape[1]

    def _prompt_end(self, given: Mapping[str, Any]) -> int:
        columns, prompt = given["input_ids"].shape[1], self._present.given
        kept = given.get("logits_to_keep")  # with drafts, generate keeps one more than there are
        kept = kept if isinstance(kept, int) and kept else None  # 0 keeps all
        drafts = columns - prompt if prompt is not None else (kept or 1) - 1
        if drafts == 0 or (prompt is not None and drafts > 0 and kept in (None, drafts + 1)):
            return int(columns - drafts)
        if prompt is None:
            raise RoutingError(
                f"Router {self.router.name} reads whole prompts, and can't say where this one "
                f"ends: the pass keeps {kept} logits (logits_to_keep), as if drafts of an answer "
                f"followed. Call the model's own generate, or leave logits_to_keep out."
            )
        raise RoutingError(
            f"Router {self.router.name} reads whole prompts: generate was given one of {prompt} "
            f"tokens, and its first pass has {columns}. Leave out what cuts or changes prompts "
            f"(prefill_chunk_size, token_healing)."
        )

    def _of_cache(self, cache: Any) -> Choice:
        known = self._of_caches.get(cache)
        if known is None:
            raise RoutingError(
                f"Router {self.router.name} reads whole prompts, and has not read the one in this "
                f"cache (a copy is another cache); pass the whole prompt without a cache."
            )
        return known

    def _grew(self, ids: Tensor) -> bool:
        prompt = self._present.prompt
        if prompt is None or ids.shape != (len(prompt), self._present.length + 1):
            return False
        return torch.equal(ids[:, : prompt.shape[1]].cpu(), prompt)


def _generate(
    context: RoutingContext, model: PreTrainedModel, inputs: Any = None, *args: Any, **kwargs: Any
) -> Any:
    present, given = context._present, kwargs.get("input_ids") if inputs is None else inputs
    before = present.given  # of a call around this one: the model may be its own assistant
    present.given = given.shape[1] if isinstance(given, Tensor) and given.dim() == 2 else None
    present.prompt = None  # what comes first is a new prompt
    try:
        return type(model).generate(model, inputs, *args, **kwargs)
    finally:
        present.given = before


def _of_any(known: Choice) -> Choice:
    if not all((part == part[0]).all() for part in (known.experts, known.weights)):
        raise RoutingError(
            "Inputs that choose different experts can't share a batch here: some of the layers are "
            "inside the base's own experts, which see some of the tokens only. Use a router for "
            "every token, such as phatgoose, or pass inputs one by one (token_budget=1 in Python)."
        )
    return known.of([0])


def _values(output: Any) -> Iterable[Any]:
    if isinstance(output, Mapping):
        return output.values()
    return output if isinstance(output, tuple) else ()


def _is_cache(value: Any) -> bool:
    return hasattr(value, "get_seq_length")


def _is_same(given: Tensor, encoded: Tensor) -> bool:
    times, rest = divmod(len(given), len(encoded))
    # One place tells: each output of an encoder depends on the whole prompt. Beams repeat rows.
    first = encoded[:, 0].repeat_interleave(times, dim=0).to(given)
    return rest == 0 and torch.equal(given[:, 0], first)


@contextmanager
def base_alone(model: PreTrainedModel) -> Iterator[None]:
    """No expert acts in this thread's passes of `model`, routed or not, and nobody watches them.

    Raises RoutingError for a model that is routed token by token.
    """
    parts: Any = getattr(model, ROUTED, None)
    if parts is None:
        yield
        return
    context: RoutingContext | None = parts.context
    if context is None:
        raise RoutingError(
            "Prompts are read by the base alone, and this model's experts act on every token; hand "
            "over the base, or detach the experts."
        )
    present = context._present
    before = present.choice, present.announced
    context.use(Choice.alone(torch.tensor([NOBODY])))
    try:
        # A pass that is watched may read a prompt first; that reading is no part of it.
        with unwatched():
            yield
    finally:
        present.choice, present.announced = before
