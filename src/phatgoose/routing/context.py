"""The routing context of a model: which experts act on each row of the present batch, and where.

All sites of a model share one if its router chooses for whole prompts, or if some of its experts
act from a prompt's end on. `composition.routing_for` announces prompts to it; it reads those that
pass unannounced by itself, in hooks of the model.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NoReturn, Protocol, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedModel

from ..errors import RoutingError
from ..passes import (
    IN_ANSWER,
    NEVER,
    ActsOn,
    beginnings,
    cache_of,
    cached_tokens,
    callable_parts,
    given_arguments,
    real_tokens,
    token_positions,
)
from ..sites import ROUTED
from .choices import NOBODY, Activity, Choice, PromptRouting
from .watching import unwatched

Result = TypeVar("Result")


class Chooser(Protocol):
    """What a context asks: a `routers.prompt.PromptRouter`."""

    name: str
    k: int
    unserved: str | None

    def choose(
        self,
        prompts: Sequence[Sequence[int]],
        base: PreTrainedModel | None = None,
        **known: Any,
    ) -> Choice: ...


class _Asked:
    """A call of `generate`: the prompt's `ids` or embeddings, its mask, and what was made of it."""

    def __init__(self, inputs: Any, given: Mapping[str, Any]) -> None:
        embeds = given.get("inputs_embeds")
        self.ids = inputs if isinstance(inputs, Tensor) and inputs.dim() == 2 else None
        known = embeds if self.ids is None and isinstance(embeds, Tensor) else self.ids
        self.shape = None if known is None else tuple(known.shape[:2])
        mask = given.get("attention_mask")
        self.mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
        self.beginnings: Tensor | None = None
        config = given.get("generation_config")
        heals = given.get("token_healing", getattr(config, "token_healing", False))
        self.changes_prompts = bool(heals)

    def mask_in(self, given: Mapping[str, Any]) -> Tensor | None:
        """Which tokens of the prompt are real, as the first pass, `given`, shows it; or None."""
        rows, columns = self.shape or (0, 0)
        mask = given.get("attention_mask") if self.mask is None else self.mask
        if mask is None:
            return torch.ones(rows, columns, dtype=torch.bool)
        if isinstance(mask, Tensor) and mask.dim() == 2:
            real: Tensor | None = mask.bool()
        else:
            positions, real = token_positions(given), real_tokens(given)  # None: all are
            if real is None and positions is not None:
                real = torch.ones_like(positions).bool()
        if real is None or real.shape[1] < columns or len(real) % rows:
            return None
        return real[:: len(real) // rows, :columns]


class _Present(threading.local):
    choice: Choice | None = None  # as `RoutingContext.choice`
    beginnings: Tensor | None = None  # of the rows' prompts, as `PromptRouting.beginnings`
    activity: Activity | None = None  # of the pass under way
    announced = False  # by somebody, rather than read
    base_alone = False  # no expert acts, whatever is chosen
    asked: _Asked | None = None  # the call of `generate` under way
    prompt: Tensor | None = None  # read last
    length = 0  # of that prompt by now
    given: int | None = None  # columns of the prompt that `generate` was given, until it is read
    depth = 0  # of calls inside calls of the model
    encoded: Tensor | None = None  # what the encoder made of the prompts read last
    checked: Tensor | None = None  # encoder outputs found to be those


def uncompiled(hook: Callable[..., Result]) -> Callable[..., Result]:
    """Keep torch.compile away from a hook that looks at tokens."""
    reason = "Routers that read prompts look at tokens; use fullgraph=False."
    left_alone: Callable[..., Result] = torch.compiler.disable(hook, reason=reason)  # type: ignore[no-untyped-call]
    return left_alone


class RoutingContext:
    """Which experts act on each row of the present batch; every thread has a batch of its own.

    `router` None leaves the choice to routers for every token. `acting` are the ends of prompts
    that some experts act on; then each pass has an `activity`, by the tokens' positions.

    A pass that goes on where an earlier one ended, from its cache or from what its encoder gave, is
    served by the experts of that one's prompt; where no one has read it, it is refused. A first
    pass of assisted decoding holds drafts of the answer after the prompt, and nothing in the pass
    tells them apart for certain: so `generate` of a causal model notes how long its prompt is.
    """

    def __init__(self, router: Chooser | None, acting: Sequence[ActsOn | None] = ()) -> None:
        self.router = router
        self.acting = tuple(dict.fromkeys(each for each in acting if each is not None))
        self._some_always_act = None in acting
        self._model: PreTrainedModel | None = None
        self._handles: list[Any] = []
        self._begin_anew()

    def _begin_anew(self) -> None:
        self._present = _Present()
        # Weak: a cache that its owner drops takes its choice along.
        self._of_caches: WeakKeyDictionary[Any, PromptRouting] = WeakKeyDictionary()

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

    def use(self, choice: Choice | None, beginnings: Tensor | None = None) -> None:
        """Use these for the rows of the passes to come; None goes back to reading prompts."""
        present = self._present
        present.choice, present.beginnings = choice, beginnings
        present.announced = choice is not None or beginnings is not None

    @contextmanager
    def using(self, routed: PromptRouting) -> Iterator[None]:
        """Use `routed` inside, and what was known before afterwards."""
        with self._kept():
            self.use(routed.choice, routed.beginnings)
            yield

    @contextmanager
    def without_experts(self) -> Iterator[None]:
        """No expert acts inside; afterwards those do that did before."""
        nowhere = torch.full((1, len(self.acting)), NEVER) if self.acting else None
        with self._kept() as present:
            self.use(Choice.alone(torch.tensor([NOBODY])), nowhere)
            present.base_alone = True
            yield

    @contextmanager
    def _kept(self) -> Iterator[_Present]:
        present, names = self._present, ["choice", "beginnings", "announced", "base_alone"]
        names += ["encoded", "checked"]  # else another encoder's outputs would get that choice
        before = {name: getattr(present, name) for name in names}
        try:
            yield present
        finally:
            vars(present).update(before)

    def choose(self, prompts: Sequence[Sequence[int]], **known: Any) -> Choice:
        if self.router is None:
            raise RoutingError("This model's router chooses for every token, for no whole prompt.")
        return self.router.choose(prompts, self._model, **known)

    def routing_of(
        self,
        prompts: Sequence[Sequence[int]],
        choice: Choice | None = None,
        asked: Sequence[Sequence[int]] | None = None,
        **known: Any,
    ) -> PromptRouting:
        """What there is to use for `prompts`; raises what the router's `choose` does.

        A `choice` that is given takes the place of the router's, which reads `asked` if that is
        given in place of `prompts`.
        """
        if choice is None and self.router is not None:
            choice = self.choose(prompts if asked is None else asked, **known)
        return PromptRouting(
            choice, beginnings(self.acting, prompts) if self.acting and prompts else None
        )

    @property
    def no_expert_acts(self) -> bool:
        """Whether no expert acts in this thread's passes, as while prompts are read."""
        return self._present.base_alone

    def active(self, columns: Tensor, tokens: int, places: Tensor | None = None) -> Tensor | None:
        """Which experts of a site are active at each of the pass's `tokens`, [tokens, E].

        `columns` [E] are those of `Activity`; of `places` only, if given. None where all are.
        Raises RoutingError outside of a pass of the model, and where the site sees other tokens
        than the pass has.
        """
        found = self._present.activity
        if found is None:
            raise RoutingError(
                "Some experts act from a prompt's end on, and nothing tells where that is: a layer "
                "was called outside of a pass of its model, as gradient checkpointing does. Turn "
                "that off, or call the model."
            )
        if all(found.whole):
            return None
        _check_tokens(found, tokens)
        mask = found.mask if places is None else found.mask[places]
        return mask.to(columns.device)[:, columns]

    def places(self, columns: tuple[int, ...], tokens: int) -> tuple[Tensor, bool] | None:
        """As `Activity.places`, in the present pass of `tokens`. None also outside of one.

        Raises RoutingError as `active`.
        """
        found = self._present.activity
        if found is None or any(found.whole[column] for column in columns):
            return None
        _check_tokens(found, tokens)
        return found.places(columns)

    def acts(self, columns: Sequence[int]) -> bool:
        """False where no expert of these columns of `Activity` acts in the present pass."""
        found = self._present.activity
        return found is None or any(found.partly[column] for column in columns)

    def of_each(self, u: Tensor, sees_all: bool = True, block: int = 0) -> Choice:
        """The experts of each token of u [T, n] in a block, [T, k]: T / rows tokens in turn.

        `sees_all` False: u holds some rows' tokens only, so all rows must have the same experts.
        Raises RoutingError when no expert is known, T is no multiple of the rows, or rows differ.
        """
        known = self.choice
        if known is None:
            unserved = self.router.unserved if self.router else None
            raise RoutingError(unserved or "Nothing has told the router yet what its inputs are.")
        known = known.at(block)
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
        # Its own thread would put our errors into empty answers.
        model.init_continuous_batching = self._refuse_shared_rows
        if self.router is not None and self.router.unserved and not self.acting:
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
            vars(self._model).pop("generate", None)  # the model's own are its class's
            vars(self._model).pop("init_continuous_batching", None)
        self._model = None

    @uncompiled
    def _begin(self, part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        present = self._present
        # Parts call each other: only the outermost call's arguments are the caller's.
        depth = 1 if part is self._model else present.depth + 1  # whatever broke off before
        if depth == 1:
            present.activity = None  # of a pass that broke off
            given = given_arguments(part, args, kwargs)
            if not present.announced:
                self._read(given)  # may call the model itself
            if self.acting:
                if present.asked is not None:
                    self._check_cache(given)
                present.activity = self._activity(given)
        present.depth = depth

    @uncompiled
    def _end(self, part: nn.Module, _: Any, output: Any) -> None:
        present = self._present
        routed = PromptRouting(present.choice, present.beginnings)
        is_known = routed.choice is not None or routed.beginnings is not None
        if present.depth == 1 and output is not None and is_known:
            if part is not self._model:  # the encoder, or else nobody will look at it
                present.encoded, present.checked = output[0], None
            for cache in filter(_is_cache, _values(output)):
                self._of_caches[cache] = routed
        present.depth = max(0, present.depth - 1)
        if present.depth == 0:
            present.activity = None

    @uncompiled
    def _check_encoded(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        present, given = self._present, given_arguments(model, args, kwargs).get("encoder_outputs")
        if given is None or present.announced or given[0] is present.checked:
            return
        if present.encoded is None or not _is_same(given[0], present.encoded):
            raise RoutingError(
                f"Router {self._name} chooses by the prompts that the encoder read last, and "
                f"these encoder_outputs are those of others; pass input_ids in their place."
            )
        present.checked = given[0]

    @property
    def _name(self) -> str:
        return self.router.name if self.router else ""

    @property
    def _who(self) -> str:
        if self.router is None:
            return "This model has experts that act from a prompt's end on"
        return f"Router {self._name} reads whole {{}}"

    def _refuse_shared_rows(self, *_: Any, **__: Any) -> NoReturn:
        raise RoutingError(
            f"{self._who.format('inputs')}, but several share a row in continuous batching "
            f"(generate_batch); use generate with a padded batch."
        )

    def _read(self, given: Mapping[str, Any]) -> None:
        present, cache = self._present, cache_of(given)
        known, cached = _is_cache(cache) and cache in self._of_caches, cached_tokens(given)
        # It goes on with prompts that were read before. Caches of states alone don't tell their
        # length; then any that is known counts.
        goes_on = known if cached is None else cached > 0
        if given.get("cu_seq_lens_q") is not None and not goes_on:
            self._refuse_shared_rows()
        asked = present.asked if self.acting else None
        if self.router is None and asked is not None and asked.shape is not None:
            present.beginnings = self._asked_for(asked, given)
        elif goes_on:
            routed = self._of_cache(cache)
            present.choice, present.beginnings = routed.choice, routed.beginnings
        else:
            self._read_prompts(given)

    def _read_prompts(self, given: Mapping[str, Any]) -> None:
        ids, present = given.get("input_ids"), self._present
        if ids is None:
            if self.router is None:
                self._read_embedded(given)
                return
            raise RoutingError(f"Router {self._name} reads the input's tokens; pass input_ids.")
        if given.get("use_cache") is not False or not self._grew(ids):
            end, real = self._prompt_end(given), real_tokens(given)
            real = torch.ones_like(ids).bool() if real is None else real
            kept = zip(ids[:, :end], real[:, :end], strict=True)
            # Padding is left out, so a prompt's choice doesn't depend on its batch.
            routed = self.routing_of([row[keep].tolist() for row, keep in kept])
            present.choice, present.beginnings = routed.choice, routed.beginnings
            present.prompt, present.given = ids.cpu(), None
        present.length = ids.shape[1]

    def _read_embedded(self, given: Mapping[str, Any]) -> None:
        embeds = given.get("inputs_embeds")
        if embeds is None:
            raise RoutingError("The model was given neither input_ids nor inputs_embeds.")
        self._prompt_end({**given, "input_ids": embeds[..., 0]})
        real = real_tokens({**given, "input_ids": embeds[..., 0]})
        rows, columns = embeds.shape[:2]
        lengths = [columns] * rows if real is None else real.sum(dim=1).tolist()
        self._present.beginnings = self._by_lengths(lengths)

    def _asked_for(self, asked: _Asked, given: Mapping[str, Any]) -> Tensor:
        """Where experts begin in the prompts that `generate` was given, whatever a pass has."""
        if asked.beginnings is None:
            real = None if asked.changes_prompts else asked.mask_in(given)
            if real is None:
                raise RoutingError(
                    "This model has experts that act from a prompt's end on, and the passes of "
                    "generate don't show where that is. Pass generate an attention_mask of two "
                    "dimensions, and leave token_healing out."
                )
            if asked.ids is None:
                asked.beginnings = self._by_lengths(real.sum(dim=1).tolist())
            else:
                rows = zip(asked.ids, real.to(asked.ids.device), strict=True)
                prompts = [row[keep].tolist() for row, keep in rows]
                asked.beginnings = beginnings(self.acting, prompts)
        return asked.beginnings

    def _by_lengths(self, lengths: Sequence[int]) -> Tensor:
        if any(each.invocation for each in self.acting):
            raise RoutingError(
                "This model has experts that act from an invocation sequence of tokens on; pass "
                "input_ids, in which it can be found."
            )
        return beginnings(self.acting, [range(length) for length in lengths])

    def _check_cache(self, given: Mapping[str, Any]) -> None:
        """Raise RoutingError if other experts acted on tokens in the cache than would act now."""
        now = self._present.beginnings
        if now is None or not cached_tokens(given):
            return
        known = self._of_caches.get(cache_of(given))
        before = known.beginnings if known is not None else None
        if before is now or (positions := token_positions(given)) is None:
            return
        read = positions[:: max(1, len(positions) // len(now)), :1].to(now.device)
        if self._some_always_act:
            now, before = pad(now, (0, 1)), None if before is None else pad(before, (0, 1))
        if before is None or before.shape != now.shape:  # the base's, as far as anyone knows
            before = torch.full_like(now, NEVER)
        differs = torch.minimum(before, read) != torch.minimum(now, read)
        if differs.any():
            first = int(torch.minimum(before, now)[differs].min())
            raise RoutingError(
                f"The cache holds {int(read.max())} tokens of this prompt, but from token {first} "
                f"on other experts acted on them than act there now: some act from a prompt's end "
                f"on. Pass the whole prompt without a cache, or a cache of fewer tokens."
            )

    def _activity(self, given: Mapping[str, Any]) -> Activity | None:
        begin, cache = self._present.beginnings, cache_of(given)
        if begin is None:
            return None
        positions = token_positions(given)
        if positions is None:
            raise RoutingError("The model was given neither input_ids nor inputs_embeds.")
        # A cache of states alone doesn't tell its length, but its prompt has been read whole.
        if cache is not None and cached_tokens(given) is None and cache in self._of_caches:
            positions = torch.full_like(positions, IN_ANSWER)
        return Activity.of(positions, begin)

    def _prompt_end(self, given: Mapping[str, Any]) -> int:
        columns, prompt = given["input_ids"].shape[1], self._present.given
        kept = given.get("logits_to_keep")  # with drafts, generate keeps one more than there are
        kept = kept if isinstance(kept, int) and kept else None  # 0 keeps all
        drafts = columns - prompt if prompt is not None else (kept or 1) - 1
        if drafts == 0 or (prompt is not None and drafts > 0 and kept in (None, drafts + 1)):
            return int(columns - drafts)
        if prompt is None:
            raise RoutingError(
                f"{self._who.format('prompts')}, and can't say where this one "
                f"ends: the pass keeps {kept} logits (logits_to_keep), as if drafts of an answer "
                f"followed. Call the model's own generate, or leave logits_to_keep out."
            )
        raise RoutingError(
            f"{self._who.format('prompts')}: generate was given one of {prompt} "
            f"tokens, and its first pass has {columns}. Leave out what cuts or changes prompts "
            f"(prefill_chunk_size, token_healing)."
        )

    def _of_cache(self, cache: Any) -> PromptRouting:
        known = self._of_caches.get(cache)
        if known is None:
            raise RoutingError(
                f"{self._who.format('prompts')}, and has not read the one in this "
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
    outer = present.asked  # drafts are of the answer to its prompt
    present.asked = outer or _Asked(given, kwargs)
    present.given = given.shape[1] if isinstance(given, Tensor) and given.dim() == 2 else None
    present.prompt = None  # what comes first is a new prompt
    try:
        return type(model).generate(model, inputs, *args, **kwargs)
    finally:
        present.given, present.asked = before, outer


def _check_tokens(activity: Activity, tokens: int) -> None:
    if len(activity.mask) != tokens:
        raise RoutingError(
            f"Some experts act from a prompt's end on, but a layer sees {tokens} of a pass's "
            f"{len(activity.mask)} tokens, as inside one of the base's own experts."
        )


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
    """No expert acts in this thread's passes of `model`, routed or not, and no one watches them.

    Raises RoutingError for a model that is routed token by token, unless all of its experts act
    from a prompt's end on.
    """
    parts: Any = getattr(model, ROUTED, None)
    if parts is None:
        yield
        return
    context: RoutingContext | None = parts.context
    if context is None or (context.router is None and not parts.all_at_ends):
        raise RoutingError(
            "Prompts are read by the base alone, and this model's experts act on every token; hand "
            "over the base, or detach the experts."
        )
    # A pass that is watched may read a prompt first; that reading is no part of it.
    with context.without_experts(), unwatched():
        yield
