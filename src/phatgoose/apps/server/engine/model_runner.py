"""One forward pass of a served model, whatever its architecture."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    EncoderDecoderCache,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_outputs import BaseModelOutput

from ....analysis.traces import TraceKeeper
from ....base.positions import positions_of
from ....base.token_masks import cache_argument
from ....routing.composition import composition_if_any
from ....routing.recording import watch
from ....routing.routers.mixtures import Mixtures
from ....routing.routers.per_input.prompt_reader import PromptReader
from ....tasks.collating import position_ids
from ....tasks.encoding import added_tokens
from ....tasks.prompt_passes import end_tokens
from ....tasks.target_logits import contiguous_head
from .caches import Cache

__all__ = ["ModelRunner"]


class ModelRunner:
    """A model with its tokenizer; each pass adds to a cache of keys and values.

    `ends` are the tokens that end an answer. `context` is how many tokens the model can hold (None:
    any number), an encoder-decoder model's encoder. `added` are the tokens before and after the
    text of a prompt. A pass shows its routing to `keeper`, if there is one.
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
        parts = composition_if_any(model)
        self._lookup = parts.lookup if parts else None

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        device: torch.device = self.model.device
        return device

    def new_cache(self) -> Cache:
        """An empty cache for the model."""
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
        """An encoder-decoder model's logits of the decoder's tokens `ids` [rows, 1].

        `encoded` comes from `encode`; `mask` [rows, columns] is 0 at the encoder's padding.
        """
        inputs = {"decoder_input_ids": ids, "attention_mask": mask, "encoder_outputs": encoded}
        return self._pass(inputs, cache, keeper)

    def encode(
        self, ids: Tensor, mask: Tensor, keeper: TraceKeeper | None = None
    ) -> BaseModelOutput:
        """The encoder's output for the prompts `ids` [rows, columns]."""
        with self._watched(keeper):
            found: BaseModelOutput = self.model.get_encoder()(input_ids=ids, attention_mask=mask)
        return found

    @property
    def looks_prompts_up(self) -> bool:
        """True for a router that picks experts by prompt, which may take long."""
        return isinstance(self._lookup, PromptReader)

    def experts_of(self, prompts: Sequence[Sequence[int]]) -> list[Mixtures | None]:
        """The experts that a router which picks by prompt has for each; None for other routers.

        May be slow (it may read each prompt with another model): not for the engine's thread.
        """
        if not isinstance(self._lookup, PromptReader):
            return [None] * len(prompts)
        return [*self._lookup.find([list(each) for each in prompts]).each()]

    def use_experts(self, experts: Sequence[Mixtures | None]) -> None:
        """Let the next pass use these, one a row, if the router picks experts by prompt."""
        if isinstance(self._lookup, PromptReader):
            self._lookup.serve(Mixtures.joined(each for each in experts if each is not None))

    def _pass(self, inputs: dict[str, Any], cache: Cache, keeper: TraceKeeper | None) -> Tensor:
        with self._watched(keeper), contiguous_head(self.model):
            logits: Tensor = self.model(
                **inputs, **{self._cache_name: cache}, use_cache=True
            ).logits
        return logits

    def _watched(self, keeper: TraceKeeper | None) -> Any:
        return watch(self.model, keeper.add) if keeper is not None else nullcontext()
