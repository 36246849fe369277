"""The routing context of a model: which experts act on each row of the present batch, and where.

All sites of a model share one if its router chooses for whole prompts, or if some of its experts
act from a prompt's end on. Prompts are announced to it, by `compose.routing_for` or by the
model's own `generate`, which chooses before the first pass. An unannounced pass without a cache is
a prompt; one with a cache, or with what an encoder put out, goes on with the experts of the prompt
that these were made of.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakIdKeyDictionary
from transformers import PreTrainedModel

from ..errors import RoutingError
from ..passes import (
    Arguments,
    arguments_of,
    cache_of,
    cached_tokens,
    callable_parts,
    real_input_ids,
    token_positions,
)
from .choice import Choice, ChoosesExperts, PromptRouting
from .conversation import ChatTexts
from .tails import IN_ANSWER, Active, PromptEnds, Tails

Result = TypeVar("Result")


class _Present(threading.local):
    """What a context knows in one thread."""

    routing = PromptRouting()  # of the rows of passes
    announced = False  # by `use`, rather than read of a pass
    ends: PromptEnds | None = None  # of the prompts of the pass under way
    depth = 0  # of calls inside calls of the model


def uncompiled(hook: Callable[..., Result]) -> Callable[..., Result]:
    """Keep torch.compile away from a hook that looks at tokens."""
    reason = "Routers that read prompts look at tokens; use fullgraph=False."
    left_alone: Callable[..., Result] = torch.compiler.disable(hook, reason=reason)  # type: ignore[no-untyped-call]
    return left_alone


class RoutingContext:
    """Which experts act on each row of the present batch; every thread has a batch of its own.

    `chooser` is None where experts are chosen for every token.
    `tails` are those of all experts; if some act on a tail, each pass has `PromptEnds`.
    """

    def __init__(self, chooser: ChoosesExperts | None, tails: Tails = ()) -> None:
        self.chooser = chooser
        self._some_always_act = None in tails
        self._longest = max(filter(None, tails), default=0)
        self._model: PreTrainedModel | None = None
        self._handles: list[RemovableHandle] = []
        self._begin_anew()

    def _begin_anew(self) -> None:
        self._present = _Present()
        # Of caches and of what encoders put out. Weak: one that its owner drops takes it along.
        self._sources: MutableMapping[object, PromptRouting] = WeakIdKeyDictionary()

    def __getstate__(self) -> dict[str, object]:
        state = dict(vars(self))
        del state["_present"], state["_sources"]
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
        texts: Sequence[str | Sequence[int] | ChatTexts] | None = None,
        **about: Any,
    ) -> PromptRouting:
        """What there is to use for `prompts`; raises what the router's `choose` does.

        A `choice` that is given takes the place of the router's, which reads `texts` if they are
        given in place of `prompts`.
        """
        if choice is None and self.chooser is not None:
            if texts is None:
                texts = prompts
            choice = self.chooser.choose(texts, **about)
        if not (self._longest and prompts):
            return PromptRouting(choice)
        return PromptRouting(choice, torch.tensor([len(prompt) for prompt in prompts]))

    def active(self, tails: Tails, device: torch.device) -> Active:
        """Where in the present pass the experts of a site are active, which have these `tails`.

        Raises RoutingError outside of a pass of the model.
        """
        if self._present.ends is None:
            raise RoutingError(
                "Some experts act from a prompt's end on, and nothing tells where that is: a layer "
                "was called outside of a pass of its model, as gradient checkpointing does. Turn "
                "that off, or call the model."
            )
        return self._present.ends.active(tails, device)

    def choice_by_token(self, u: Tensor, sees_all: bool = True) -> Choice:
        """The experts of each token of u [T, n], as [T, k]: T / rows tokens in turn.

        `sees_all` False: u holds some rows' tokens only, or tokens in another order, so all rows
        must have the same experts.
        Raises RoutingError when no expert is known, T is no multiple of the rows, or rows differ.
        """
        # Outside of a pass a layer is computed again, and other prompts may have been read since.
        # Without hooks passes are never seen, and what was announced is all that there is.
        is_known = self._present.depth or self._present.announced or not self._handles
        choice = self.choice
        if choice is None or not is_known:
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
        parts = [*callable_parts(model)]
        if self._is_encoder_decoder:
            parts = [model.get_encoder(), model]
        for part in parts:
            begin = part.register_forward_pre_hook(self._begin, with_kwargs=True)
            # Also after a pass that raised, so that depth is right again.
            end = part.register_forward_hook(self._end, always_call=True)
            self._handles += [begin, end]
        if model.can_generate():
            # On the instance, over the class's own; detach takes it away again.
            model.generate = partial(self._generate, model)

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._model = None

    @uncompiled
    def _begin(self, part: nn.Module, args: tuple[object, ...], kwargs: Arguments) -> None:
        present = self._present
        # Parts call each other: only the outermost call's arguments are the caller's.
        depth = present.depth + 1
        if part is self._model:
            depth = 1  # whatever broke off before
        if depth == 1:
            present.ends = None  # of a pass that broke off
            call = arguments_of(part, args, kwargs)
            if not present.announced:
                present.routing = self._read(call)
            if self._longest:
                present.ends = self._ends(call)
        present.depth = depth

    @uncompiled
    def _end(self, part: nn.Module, _: object, output: Any) -> None:
        present = self._present
        if present.depth == 1 and output is not None:
            if part is not self._model and self._is_encoder_decoder:
                self._sources[output[0]] = present.routing
            values = output.values() if isinstance(output, Mapping) else output
            for cache in filter(_is_cache, values):
                self._sources[cache] = present.routing
        present.depth = max(0, present.depth - 1)
        if present.depth == 0:
            present.ends = None

    @property
    def _is_encoder_decoder(self) -> bool:
        return self._model is not None and bool(self._model.config.is_encoder_decoder)

    @property
    def _who(self) -> str:
        if self.chooser is None:
            return "This model has experts that act from a prompt's end on"
        return f"Router {self.chooser.name} reads whole prompts"

    def _refuse_shared_rows(self, *_: object, **__: object) -> NoReturn:
        raise RoutingError(
            f"{self._who}, but several share a row in continuous batching (generate_batch); use "
            f"generate with a padded batch."
        )

    def _read(self, call: Arguments) -> PromptRouting:
        source = cache_of(call)
        length = cached_tokens(call)
        # Caches of states alone don't tell their length; then any that is known counts.
        goes_on = source in self._sources if length is None else length > 0
        if self._is_encoder_decoder:
            encoded = call.get("encoder_outputs")
            goes_on = encoded is not None
            source = None if encoded is None else encoded[0]
        if goes_on:
            if source not in self._sources:
                raise RoutingError(
                    f"{self._who}, and has not read the one in this cache or these "
                    f"encoder_outputs (a copy is another one); pass the whole prompt without them."
                )
            return self._sources[source]
        if call.get("cu_seq_lens_q") is not None:
            self._refuse_shared_rows()
        ids = call.get("input_ids")
        embeds = call.get("inputs_embeds")
        if ids is None and self.chooser:
            raise RoutingError(f"{self._who}, which are tokens; pass input_ids.")
        if ids is None:
            if embeds is None:
                return PromptRouting()  # the model says itself what it lacks
            ids = torch.arange(embeds.shape[1]).expand(len(embeds), -1)  # lengths are enough
            call = {**call, "input_ids": embeds[..., 0]}
        return self._routing_of_rows(ids, real_input_ids(call))

    def _routing_of_rows(self, ids: Tensor, real: Tensor | None) -> PromptRouting:
        # Padding is left out, so a prompt's choice doesn't depend on its batch.
        if real is None:
            return self.routing_of(ids.tolist())
        real = real.bool().to(ids.device)
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

    def _ends(self, call: Arguments) -> PromptEnds | None:
        lengths = self._present.routing.lengths
        positions = token_positions(call)
        if lengths is None or positions is None:
            return None
        # A cache of states alone doesn't tell its length, but its prompt has been read whole.
        if cache_of(call) in self._sources and cached_tokens(call) is None:
            positions = torch.full_like(positions, IN_ANSWER)
        return PromptEnds(positions, lengths)

    def _generate(
        self, model: PreTrainedModel, inputs: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        """The model's own `generate`, for which experts are chosen before its first pass.

        Drafts, chunks and beams are all of the prompts that it is given. With a cache that is known
        and not empty, the experts of the prompt that filled it go on.
        """
        ids = inputs
        if ids is None:
            ids = kwargs.get("input_ids")
        mask = kwargs.get("attention_mask")
        cache = cache_of(kwargs)
        present = self._present
        generate = partial(type(model).generate, model, inputs, *args, **kwargs)
        is_text = isinstance(ids, Tensor) and ids.dim() == 2 and kwargs.get("inputs_embeds") is None
        has_rows = mask is None or mask.dim() == 2
        is_read = is_text and has_rows and not present.announced
        cached = cached_tokens(kwargs)
        before = None
        if _is_cache(cache) and cached != 0:
            before = self._sources.get(cache)
        if is_read:
            if mask is None:
                configs = [model.generation_config, kwargs.get("generation_config"), *args[:1]]
                mask = _inferred_mask(ids, kwargs, configs)
            routing = before or self._routing_of_rows(ids, mask)
        else:
            mask = None
            routing = present.routing
        is_fixed = present.announced and routing.lengths is None  # the same for all tokens
        if cached and not before and not is_fixed:
            self.check_unread(cached, routing.lengths, mask)
        if not is_read:
            return generate()  # its first pass is read
        with self.using(routing):
            answer = generate()
        present.routing = routing  # which `choice` tells, until the next prompt
        return answer


def _inferred_mask(ids: Tensor, call: Arguments, configs: Iterable[object]) -> Tensor | None:
    """Where tokens are no padding, as transformers infers it; None if that can't be told.

    The model's own config, the first, fills fields that others leave open.
    """
    settings: dict[str, Any] = {}
    for fields in (*map(vars, filter(None, configs)), call):
        settings |= {name: value for name, value in fields.items() if value is not None}
    pad = settings.get("pad_token_id")
    ends = settings.get("eos_token_id")
    if not isinstance(ends, list | tuple):
        ends = [ends]
    if pad is None or pad in ends:
        return None
    return ids.ne(pad)


def _is_cache(value: object) -> bool:
    return hasattr(value, "get_seq_length")
