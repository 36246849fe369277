"""Passes of a model: which tokens are padding, and what layers and models are called with.

Routing doesn't need to know padding: it treats it like any token, since no real token attends to
it. To leave padding out, open `token_masks` (or `watching`), which reads the attention masks of
the calls made in the same context (so in the same thread) while it is open.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from .errors import RoutingError
from .sites import Site, Stream

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Value = TypeVar("Value")
Arguments = Mapping[str, Any]  # of a call of a model, by name


class _Names(NamedTuple):
    mask: str
    tokens: tuple[str, ...]


_Streams = Mapping[Stream, _Names]
_OWN = _Names("attention_mask", ("input_ids", "inputs_embeds"))
_STACK: _Streams = {"decoder": _OWN}  # a causal model and its parts
_ENCODER: _Streams = {"encoder": _OWN}
_DECODER: _Streams = {
    "encoder": _Names("encoder_attention_mask", ("encoder_hidden_states",)),
    "decoder": _OWN,
}
_WHOLE: _Streams = {
    "encoder": _OWN,
    "decoder": _Names(
        "decoder_attention_mask", ("decoder_input_ids", "decoder_inputs_embeds", "labels")
    ),
}
# A cache's names in transformers: the first since 5.24, before it the others, the last for Mamba.
_CACHES = ("cache", "past_key_values", "cache_params")


@dataclass
class _Tokens:
    """A stream's tokens in one call: mask, (rows, columns) if known, tokens in the cache."""

    mask: Tensor | None
    shape: tuple[int, ...] | None
    past: int | None

    def real(self, grid: tuple[int, ...]) -> Tensor | None:
        """Which tokens of this shape are no padding, None where all are, or it isn't known."""
        mask = self.mask
        if mask is None or len(grid) != 2:
            return None
        rows, columns = grid
        first = mask.shape[-1] - columns
        if self.past is not None and self.past <= first:
            first = self.past  # the mask covers a whole static cache
        real = None
        if mask.dim() == 2 and mask.shape[0] == rows and first >= 0:
            real = mask[:, first : first + columns].bool()
        if mask.dim() == 4 and mask.shape[0] in (1, rows) and mask.shape[2] == columns:
            itself = mask[:, 0].diagonal(first, dim1=1, dim2=2)
            seen = itself if itself.dtype == torch.bool else itself == 0
            if seen.shape[1] == columns:
                real = seen.expand(rows, -1)
        # On other devices the look would wait for them.
        if real is not None and real.device.type == "cpu" and real.all():
            return None
        return real


class TokenMasks:
    """Which of the tokens now passing through a model are real (True) rather than padding.

    The mask of a call is what its caller passed, to the whole model or to one of its stacks. With a
    cache it covers past tokens too. In a mask [rows, 1, queries, keys] the real tokens are those
    that see themselves (`tasks.batching`).
    """

    def __init__(self, architecture: str) -> None:
        self.architecture = architecture  # for errors
        self._calls: list[Mapping[Stream, _Tokens]] = []  # the current one and those inside it

    @property
    def are_ours(self) -> bool:
        return self in _OPEN.get()

    def grid(self, u: Tensor, stream: Stream) -> tuple[int, ...]:
        """The shape of the tokens of u [.., n], mostly (rows, columns), also of flattened ones.

        Raises RoutingError where a model pads or transposes its tokens inside.
        """
        tokens = self._of(stream)
        grid = u.shape[:-1]
        if tokens is None or tokens.shape is None or grid == tokens.shape:
            return grid
        rows, columns = tokens.shape
        if grid == (rows * columns,):
            return tokens.shape
        if len(grid) == 2 and (grid[0] == rows or grid == (columns, rows)):
            raise RoutingError(
                f"{self.architecture} pads or transposes its tokens inside: a call of {rows} x "
                f"{columns} tokens has {grid[0]} x {grid[1]} activations, so padding can't be told "
                f"from tokens. Recordings, analyses and mean activations need another base."
            )
        return grid

    def real_tokens(self, u: Tensor, stream: Stream) -> Tensor | None:
        """A boolean mask in the shape of `grid`, None when every token of `u` [.., n] is real."""
        tokens = self._of(stream)
        return None if tokens is None else tokens.real(self.grid(u, stream))

    def _of(self, stream: Stream) -> _Tokens | None:
        # The outermost call has the caller's own mask; those inside it may get one made of it.
        return self._calls[0].get(stream) if self._calls else None

    def _begin(
        self,
        names: _Streams,
        module: nn.Module,
        args: tuple[object, ...],
        kwargs: Arguments | None = None,
    ) -> None:
        # Another thread's pass may run the hook before torch registers that it takes kwargs.
        if self.are_ours:
            self._calls.append(_streams(names, arguments_of(module, args, kwargs or {})))

    def _end(self, *_: object) -> None:
        if self.are_ours and self._calls:
            self._calls.pop()


@contextmanager
def in_context(variable: ContextVar[Value], value: Value) -> Iterator[None]:
    """`variable` has this value, in this thread, until the context closes."""
    before = variable.set(value)
    try:
        yield
    finally:
        variable.reset(before)


_OPEN: ContextVar[tuple[TokenMasks, ...]] = ContextVar("open masks", default=())


@contextmanager
def token_masks(model: PreTrainedModel) -> Iterator[TokenMasks]:
    """While it is open, the masks of the pass that `model` is in."""
    masks = TokenMasks(type(model).__name__)
    with ExitStack() as hooks:
        for part, names in callable_parts(model).items():
            watch = partial(masks._begin, names)
            hooks.callback(part.register_forward_pre_hook(watch, with_kwargs=True).remove)
            # always_call: a pass that raises must not leave its masks on top.
            hooks.callback(part.register_forward_hook(masks._end, always_call=True).remove)
        hooks.enter_context(in_context(_OPEN, (*_OPEN.get(), masks)))
        yield masks


@contextmanager
def watching(
    model: PreTrainedModel,
    sites: Iterable[Site],
    see: Callable[[Site, Tensor, Tensor | None], None],
) -> Iterator[None]:
    """Call `see(site, u, real)` for each pass through each of `sites` in this context.

    `u` are the site's inputs, usually [rows, tokens, n]; `real` [rows, tokens] is the mask of their
    non-padding tokens, None for all. Passes of other threads are not seen. Raises RoutingError as
    `TokenMasks.grid` does.
    """
    with token_masks(model) as masks, ExitStack() as hooks:

        def look(site: Site, _: nn.Module, args: tuple[Tensor, ...]) -> None:
            if masks.are_ours:
                u = args[0]
                grid = masks.grid(u, site.stream)
                real = masks.real_tokens(u, site.stream)
                see(site, u.reshape(*grid, u.shape[-1]), real)

        for site in sites:
            layer = model.get_submodule(site.name)
            hooks.callback(layer.register_forward_pre_hook(partial(look, site)).remove)
        yield


# What a model is called with.


def arguments_of(module: nn.Module, args: Sequence[object], kwargs: Arguments) -> Arguments:
    """A call's arguments by name, those given by place too."""
    names = inspect.signature(module.forward).parameters if args else ()
    return {**dict(zip(names, args, strict=False)), **kwargs}


def real_input_ids(call: Arguments) -> Tensor | None:
    """Which of the `input_ids` of a call are real, None for all of them."""
    tokens = _streams(_STACK, call)["decoder"]
    return None if tokens.shape is None else tokens.real(tokens.shape)


def token_positions(call: Arguments) -> Tensor | None:
    """The position of each token of a causal model's call in its text, [rows, columns].

    Padding isn't counted; its own positions mean nothing. None for a call without tokens.
    """
    tokens = _streams(_STACK, call)["decoder"]
    if tokens.shape is None:
        return None
    rows, columns = tokens.shape
    past = tokens.past or 0
    mask = tokens.mask
    if mask is not None and mask.dim() == 2:
        first = min(past, mask.shape[1] - columns)
        counted = mask.long().cumsum(dim=-1) - 1
        return counted[:, first : first + columns].clamp(min=0).expand(rows, -1)
    position_ids = call.get("position_ids")
    if isinstance(position_ids, Tensor) and position_ids.dim() == 2:
        return position_ids.expand(rows, -1)
    form = _first(call, _OWN.tokens)
    return torch.arange(past, past + columns, device=form.device).expand(rows, -1)


def _first(call: Arguments, names: Iterable[str]) -> Any:
    """The first argument of these names that isn't None; None without one."""
    return next((call[name] for name in names if call.get(name) is not None), None)


def callable_parts(model: PreTrainedModel) -> dict[nn.Module, _Streams]:
    """The modules that a caller may call for a pass, with the argument names of their streams."""
    if not model.config.is_encoder_decoder:
        # OPT's whole model, for one, calls its decoder past its base model: the outermost that is
        # called counts.
        parts = (model, model.base_model, model.get_decoder())
        return {part: _STACK for part in parts if isinstance(part, nn.Module)}
    return {
        model.get_encoder(): _ENCODER,
        model.get_decoder(): _DECODER,
        model.base_model: _WHOLE,
        model: _WHOLE,
    }


def cache_argument(part: nn.Module) -> str:
    """What `part.forward` calls its cache."""
    names = inspect.signature(part.forward).parameters
    return next((name for name in _CACHES if name in names), "past_key_values")


def cache_of(call: Arguments) -> Any:
    """The cache among the arguments of a call, under any of its names; None without one."""
    return _first(call, _CACHES)


def cached_tokens(call: Arguments) -> int | None:
    """The number of tokens in the cache of a call, None without one or where it is unknown."""
    cache = cache_of(call)
    try:
        return int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else None
    except ValueError:  # of a cache that holds states alone, as Mamba's
        return None


def _streams(names: _Streams, call: Arguments) -> Mapping[Stream, _Tokens]:
    streams = {}
    for stream, (mask_name, token_names) in names.items():
        form = _first(call, token_names)
        shape = None if form is None else form.shape[:2]
        mask = call.get(mask_name)
        if isinstance(mask, Mapping):  # one mask for each kind of attention layer
            mask = mask.get("full_attention", next(iter(mask.values()), None))
        if not isinstance(mask, Tensor):
            mask = None
        past = cached_tokens(call) if stream == "decoder" else None
        streams[stream] = _Tokens(mask, shape, past)
    return streams
