"""Lookups that choose by prompts: announced ones, or those that pass through the model.

A pass that goes on where an earlier one ended, from its cache or from what its encoder gave, is
served by the experts of that one's prompt; where nobody has read it, it is refused.

A first pass of assisted decoding holds drafts of the answer after the prompt, and nothing in the
pass tells them apart for certain. So `generate` of a causal model notes how long its prompt is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ....base.token_masks import (
    cache_of,
    cached_tokens,
    callable_parts,
    given_arguments,
    real_tokens,
)
from ....errors import RoutingError
from ..lookup import Lookup
from ..mixtures import Mixtures

__all__ = ["PromptReader"]


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
