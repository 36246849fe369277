"""Lookups that choose by prompts: announced ones, or those that pass through the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ....base.token_masks import cached_tokens, callable_parts, given_arguments, real_tokens
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

    def of_prompts(self, texts: Sequence[str]) -> Mixtures:
        """The experts of each prompt."""
        raise NotImplementedError

    def of_tokens(self, prompts: Sequence[list[int]]) -> Mixtures:
        """The same of prompts given by their tokens; special ones are no part of the text."""
        return self.of_prompts(self.tokenizer.batch_decode(prompts, skip_special_tokens=True))

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

    def detach(self) -> None:
        """Stop reading prompts."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._model = None

    @_uncompiled
    def _begin(self, part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        turn = self._turn
        turn.depth = 1 if part is self._model else turn.depth + 1  # whatever broke off before
        if turn.depth == 1 and not turn.announced:
            self._read(given_arguments(part, args, kwargs))

    @_uncompiled
    def _end(self, *_: Any) -> None:
        self._turn.depth = max(0, self._turn.depth - 1)

    def _read(self, given: Mapping[str, Any]) -> None:
        """Find the experts of the prompts in a call's arguments, unless it goes on with others."""
        ids, turn = given.get("input_ids"), self._turn
        if (cached_tokens(given) or 0) > 0:
            return
        if given.get("cu_seq_lens_q") is not None:
            raise RoutingError(
                f"Router {self.name} reads whole inputs, but several share a row here (continuous "
                f"batching); use generate with a padded batch."
            )
        if ids is None:
            raise RoutingError(f"Router {self.name} reads the input's tokens; pass input_ids.")
        if not self._grew(ids):
            real = real_tokens(given)
            kept = zip(ids, torch.ones_like(ids).bool() if real is None else real, strict=True)
            turn.mixtures = self.of_tokens([row[keep].tolist() for row, keep in kept])
            turn.prompt = ids.cpu()
        turn.length = ids.shape[1]

    def _grew(self, ids: Tensor) -> bool:
        """True for the prompt read last, a token longer: a step of generation without a cache."""
        prompt = self._turn.prompt
        if prompt is None or ids.shape != (len(prompt), self._turn.length + 1):
            return False
        return torch.equal(ids[:, : prompt.shape[1]].cpu(), prompt)
