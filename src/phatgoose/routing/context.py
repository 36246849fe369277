"""The routing context of a model: which experts act on each row of the present batch, and where.

All sites of a model share one if its router chooses for whole prompts, or if some of its experts
act from a prompt's end on. Prompts are announced to it, by `compose.routing_for` or by the
model's own `generate`, which chooses before the first pass. An unannounced pass without a cache is
a prompt; one with a cache, or with what an encoder put out, goes on with the experts of the prompt
that these were made of.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, NoReturn, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakIdKeyDictionary
from transformers import PreTrainedModel

from ..errors import RoutingError
from ..passes import (
    IN_ANSWER,
    cache_of,
    cached_tokens,
    callable_parts,
    given_arguments,
    real_tokens,
    token_positions,
)
from .choice import Choice, Chooser, PromptRouting
from .conversation import ChatTexts

Result = TypeVar("Result")
Tails = tuple[int | None, ...]  # of a prompt's last tokens that each expert acts on, None for all


class Acting(NamedTuple):
    """Where the experts of a site act in a pass of T tokens.

    `mask` [T, E] says where each does, None for all of them everywhere. If that is at most a half
    of the tokens, `places` are those where any acts, and `mask_there` is the mask at these.
    """

    mask: Tensor | None = None
    places: Tensor | None = None
    mask_there: Tensor | None = None


class Activity:
    """Where in a pass experts act, by their tails."""

    def __init__(self, positions: Tensor, lengths: Tensor) -> None:
        """Of tokens at `positions` [rows, columns] behind prompts of `lengths` [rows or tokens]."""
        rows, columns = positions.shape
        if len(lengths) != positions.numel():  # beams repeat rows
            lengths = lengths.repeat_interleave(rows // len(lengths) * columns)
        self._left = lengths.to(positions.device) - positions.flatten()  # of the prompt, [tokens]
        self._at: dict[Tails, Acting] = {}

    def at(self, tails: Tails) -> Acting:
        """Where a site's experts act, which have these tails."""
        if tails not in self._at:  # many sites of a pass ask for the same
            reach = [tail or sys.maxsize for tail in tails]
            mask = self._left[:, None] <= torch.tensor(reach, device=self._left.device)
            places = mask.any(dim=1).nonzero()[:, 0]
            mask_there = mask[places]
            all_act = bool(mask_there.all())
            if all_act and len(places) == len(mask):
                self._at[tails] = Acting()
            else:
                few = 2 * len(places) <= len(mask)
                self._at[tails] = Acting(
                    mask, places if few else None, None if all_act else mask_there
                )
        return self._at[tails]


class _Present(threading.local):
    routing = PromptRouting()  # of the rows of passes
    announced = False  # by somebody, rather than read
    activity: Activity | None = None  # of the pass under way
    depth = 0  # of calls inside calls of the model


def uncompiled(hook: Callable[..., Result]) -> Callable[..., Result]:
    """Keep torch.compile away from a hook that looks at tokens."""
    reason = "Routers that read prompts look at tokens; use fullgraph=False."
    left_alone: Callable[..., Result] = torch.compiler.disable(hook, reason=reason)  # type: ignore[no-untyped-call]
    return left_alone


class RoutingContext:
    """Which experts act on each row of the present batch; every thread has a batch of its own.

    `chooser` is None where experts are chosen for every token.
    `tails` are those of all experts; if some act on a tail, each pass has an `Activity`, by the
    tokens' positions.
    """

    def __init__(self, chooser: Chooser | None, tails: Tails = ()) -> None:
        self.chooser = chooser
        self._some_always_act = None in tails
        self._longest = max((tail for tail in tails if tail), default=0)
        self._model: PreTrainedModel | None = None
        self._handles: list[RemovableHandle] = []
        self._begin_anew()

    def _begin_anew(self) -> None:
        self._present = _Present()
        # Of caches and of what encoders put out. Weak: one that its owner drops takes it along.
        self._known: MutableMapping[object, PromptRouting] = WeakIdKeyDictionary()

    def __getstate__(self) -> dict[str, object]:
        state = dict(vars(self))
        del state["_present"], state["_known"]
        return state

    def __setstate__(self, state: Mapping[str, object]) -> None:
        self.__dict__.update(state)
        self._begin_anew()

    @property
    def choice(self) -> Choice | None:
        """The experts of this thread's rows, or of all as one row; None if unknown."""
        return self._present.routing.choice

    def use(self, choice: Choice | None, lengths: Tensor | None = None) -> None:
        """Use these for the rows of the passes to come; None goes back to reading prompts."""
        present = self._present
        present.routing = PromptRouting(choice, lengths)
        present.announced = choice is not None or lengths is not None

    @contextmanager
    def using(self, routing: PromptRouting) -> Iterator[None]:
        """Use `routing` inside, and what was known before afterwards."""
        present = self._present
        before = present.routing
        was_announced = present.announced
        try:
            self.use(routing.choice, routing.lengths)
            yield
        finally:
            present.routing = before
            present.announced = was_announced

    def routing_of(
        self,
        prompts: Sequence[Sequence[int]],
        choice: Choice | None = None,
        asked: Sequence[str | Sequence[int] | ChatTexts] | None = None,
        **known: Any,
    ) -> PromptRouting:
        """What there is to use for `prompts`; raises what the router's `choose` does.

        A `choice` that is given takes the place of the router's, which reads `asked` if that is
        given in place of `prompts`.
        """
        if choice is None and self.chooser is not None:
            read = prompts if asked is None else asked
            choice = self.chooser.choose(read, **known)
        if not (self._longest and prompts):
            return PromptRouting(choice)
        return PromptRouting(choice, torch.tensor([len(prompt) for prompt in prompts]))

    def acting_at(self, tails: Tails) -> Acting:
        """Where in the present pass the experts of a site act, which have these `tails`.

        Raises RoutingError outside of a pass of the model.
        """
        if self._present.activity is None:
            raise RoutingError(
                "Some experts act from a prompt's end on, and nothing tells where that is: a layer "
                "was called outside of a pass of its model, as gradient checkpointing does. Turn "
                "that off, or call the model."
            )
        return self._present.activity.at(tails)

    def of_each(self, u: Tensor, sees_all: bool = True) -> Choice:
        """The experts of each token of u [T, n], as [T, k]: T / rows tokens in turn.

        `sees_all` False: u holds some rows' tokens only, or tokens in another order, so all rows
        must have the same experts.
        Raises RoutingError when no expert is known, T is no multiple of the rows, or rows differ.
        """
        # Outside of a pass a layer is computed again, and other prompts may have been read since.
        is_known = self._present.depth or self._present.announced or not self._handles
        choice = self.choice if is_known else None
        if choice is None:
            if self.chooser and self.chooser.unserved:
                raise RoutingError(self.chooser.unserved)
            raise RoutingError(
                "Nothing has told the router what its inputs are: a layer was called outside of "
                "a pass of its model, as gradient checkpointing does."
            )
        if not sees_all and choice.is_one_for_all:
            choice = choice.of([0])
            sees_all = True
        count, rest = divmod(len(u), len(choice))
        if rest or not sees_all:
            raise RoutingError(
                f"{len(u)} tokens can't be shared out to {len(choice)} inputs that choose "
                f"different experts: some layers take tokens in another order, or are inside the "
                f"base's own experts, which see some only. Use a router for every token, such as "
                f"phatgoose, or pass inputs one by one (token_budget=1 in Python)."
            )
        return Choice(
            choice.experts.to(u.device).repeat_interleave(count, dim=0),
            choice.weights.to(u.device).repeat_interleave(count, dim=0),
        )

    def attach(self, model: PreTrainedModel) -> None:
        """Read every new prompt that `model` is given, if the router can go by prompts alone."""
        self._model = model
        # Its own thread would put our errors into empty answers.
        model.init_continuous_batching = self._refuse_shared_rows
        if self.chooser is not None and self.chooser.unserved and not self._longest:
            return
        is_encoder_decoder = model.config.is_encoder_decoder
        for part in (model.get_encoder(), model) if is_encoder_decoder else callable_parts(model):
            self._handles += [
                part.register_forward_pre_hook(self._begin, with_kwargs=True),
                # Also after a pass that raised, so that depth is right again.
                part.register_forward_hook(self._end, always_call=True),
            ]
        if model.can_generate():
            # On the instance, over the class's own; detach takes it away again.
            model.generate = partial(_generate, self, model)

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._model = None

    @uncompiled
    def _begin(self, part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        present = self._present
        # Parts call each other: only the outermost call's arguments are the caller's.
        depth = 1 if part is self._model else present.depth + 1  # whatever broke off before
        if depth == 1:
            present.activity = None  # of a pass that broke off
            call = given_arguments(part, args, kwargs)
            if not present.announced:
                present.routing = self._read(call)
            if self._longest:
                present.activity = self._activity(call)
        present.depth = depth

    @uncompiled
    def _end(self, part: nn.Module, _: Any, output: Any) -> None:
        present = self._present
        if present.depth == 1 and output is not None:
            if part is not self._model and self._is_encoder_decoder:
                self._known[output[0]] = present.routing
            for value in output.values() if isinstance(output, Mapping) else output:
                if _is_cache(value):
                    self._known[value] = present.routing
        present.depth = max(0, present.depth - 1)
        if present.depth == 0:
            present.activity = None

    @property
    def _is_encoder_decoder(self) -> bool:
        return self._model is not None and bool(self._model.config.is_encoder_decoder)

    @property
    def _who(self) -> str:
        if self.chooser is None:
            return "This model has experts that act from a prompt's end on"
        return f"Router {self.chooser.name} reads whole prompts"

    def _refuse_shared_rows(self, *_: Any, **__: Any) -> NoReturn:
        raise RoutingError(
            f"{self._who}, but several share a row in continuous batching (generate_batch); use "
            f"generate with a padded batch."
        )

    def _read(self, given: Mapping[str, Any]) -> PromptRouting:
        source = cache_of(given)
        length = cached_tokens(given)
        # Caches of states alone don't tell their length; then any that is known counts.
        goes_on = source in self._known if length is None else length > 0
        if self._is_encoder_decoder:
            encoded = given.get("encoder_outputs")
            goes_on = encoded is not None
            source = None if encoded is None else encoded[0]
        if goes_on:
            if source not in self._known:
                raise RoutingError(
                    f"{self._who}, and has not read the one in this cache or these "
                    f"encoder_outputs (a copy is another one); pass the whole prompt without them."
                )
            return self._known[source]
        if given.get("cu_seq_lens_q") is not None:
            self._refuse_shared_rows()
        ids = given.get("input_ids")
        embeds = given.get("inputs_embeds")
        if ids is None and self.chooser:
            raise RoutingError(f"{self._who}, which are tokens; pass input_ids.")
        if ids is None:
            if embeds is None:
                return PromptRouting()  # the model says itself what it lacks
            ids = torch.arange(embeds.shape[1]).expand(len(embeds), -1)  # lengths are enough
            given = {**given, "input_ids": embeds[..., 0]}
        return self._routing_of_rows(ids, real_tokens(given))

    def _routing_of_rows(self, ids: Tensor, real: Tensor | None) -> PromptRouting:
        # Padding is left out, so a prompt's choice doesn't depend on its batch.
        real = torch.ones_like(ids).bool() if real is None else real.bool().to(ids.device)
        return self.routing_of([row[keep].tolist() for row, keep in zip(ids, real, strict=True)])

    def check_unread(self, cached: int, lengths: Tensor | None, mask: Tensor | None) -> None:
        """Raise RoutingError where experts should have acted on the `cached` tokens.

        Somebody else read these, of prompts of `lengths`, with the `mask`.
        """
        if lengths is not None and not self._some_always_act:
            read = cached if mask is None else mask[:, :cached].sum(dim=1).cpu()
            until = (lengths - self._longest).clamp(min=0)  # where the first one acts
            if not torch.any(read > until):
                return
        raise RoutingError(
            f"{self._who}, and has not read the {cached} tokens in this cache, where some "
            f"act; pass the whole prompt without a cache, or a cache of fewer tokens."
        )

    def _activity(self, given: Mapping[str, Any]) -> Activity | None:
        lengths = self._present.routing.lengths
        positions = token_positions(given)
        if lengths is None or positions is None:
            return None
        # A cache of states alone doesn't tell its length, but its prompt has been read whole.
        cache = cache_of(given)
        if cache is not None and cached_tokens(given) is None and cache in self._known:
            positions = torch.full_like(positions, IN_ANSWER)
        return Activity(positions, lengths)


def _generate(
    context: RoutingContext, model: PreTrainedModel, inputs: Any = None, *args: Any, **kwargs: Any
) -> Any:
    """The model's own `generate`, for which experts are chosen before its first pass.

    Drafts, chunks and beams are all of the prompts that it is given. With a cache that is known and
    not empty, the experts of the prompt that filled it go on.
    """
    ids: Any = kwargs.get("input_ids") if inputs is None else inputs
    mask = kwargs.get("attention_mask")
    cache = cache_of(kwargs)
    present = context._present
    generate = partial(type(model).generate, model, inputs, *args, **kwargs)
    is_text = isinstance(ids, Tensor) and ids.dim() == 2 and kwargs.get("inputs_embeds") is None
    has_odd_mask = mask is not None and mask.dim() != 2
    is_read = is_text and not present.announced and not has_odd_mask
    if not is_read:
        mask = None
    cached = cached_tokens(kwargs)
    before = context._known.get(cache) if _is_cache(cache) and cached != 0 else None
    if is_read and mask is None:
        configs = [*args[:1], kwargs.get("generation_config"), model.generation_config]
        mask = _inferred_mask(ids, kwargs, configs)
    routing = present.routing
    if is_read:
        routing = before or context._routing_of_rows(ids, mask)
    is_fixed = present.announced and routing.lengths is None  # the same for all tokens
    if cached and not before and not is_fixed:
        context.check_unread(cached, routing.lengths, mask)
    if not is_read:
        return generate()  # its first pass is read
    with context.using(routing):
        answer = generate()
    present.routing = routing  # which `choice` tells, until the next prompt
    return answer


def _inferred_mask(
    ids: Tensor, arguments: Mapping[str, Any], configs: Iterable[object]
) -> Tensor | None:
    """Where tokens are no padding, as transformers infers it; None if that can't be told.

    The model's own config, the last, fills fields that others leave open.
    """
    places = [arguments, *map(vars, filter(None, configs))]

    def first(name: str) -> Any:
        return next((place[name] for place in places if place.get(name) is not None), None)

    pad = first("pad_token_id")
    ends = first("eos_token_id")
    ends = ends if isinstance(ends, list | tuple) else [ends]
    return None if pad is None or pad in ends else ids.ne(pad)


def _is_cache(value: object) -> bool:
    return hasattr(value, "get_seq_length")
