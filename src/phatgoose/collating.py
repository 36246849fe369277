"""Batches of token pairs as model inputs, and the logits that predict their targets."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from peft import PeftModel
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from .encoding import IGNORED, TokenPair, pad_left, pad_right, position_ids

__all__ = ["Collator", "target_logits"]


class Collator:
    """Batches of token pairs as model inputs, for one kind of model.

    Causal models get prompt and target in one left-padded row, so that all targets end in the last
    columns; sequence-to-sequence models get them apart. `labels` is [rows, longest target] in both
    cases, right-aligned or left-aligned accordingly, IGNORED where there is no target token.
    """

    def __init__(self, model: PreTrainedModel, pad_token_id: int) -> None:
        self._pad = pad_token_id
        self._is_encoder_decoder = bool(model.config.is_encoder_decoder)
        self._start: int = getattr(model.config, "decoder_start_token_id", None) or 0
        accepted = inspect.signature(model.forward).parameters
        self._wants_positions = "position_ids" in accepted

    def __call__(self, pairs: Sequence[TokenPair]) -> dict[str, Tensor]:
        """The pairs as tensors that `target_logits` and the model's forward take."""
        return self._seq2seq(pairs) if self._is_encoder_decoder else self._causal(pairs)

    def _causal(self, pairs: Sequence[TokenPair]) -> dict[str, Tensor]:
        rows = [pair.prompt + pair.target for pair in pairs]
        batch = {
            "input_ids": pad_left(rows, self._pad),
            "attention_mask": pad_left([[1] * len(row) for row in rows], 0),
            "labels": pad_left([pair.target for pair in pairs], IGNORED),
        }
        if self._wants_positions:
            batch["position_ids"] = position_ids(batch["attention_mask"])
        return batch

    def _seq2seq(self, pairs: Sequence[TokenPair]) -> dict[str, Tensor]:
        prompts, targets = [pair.prompt for pair in pairs], [pair.target for pair in pairs]
        return {
            "input_ids": pad_right(prompts, self._pad),
            "attention_mask": pad_right([[1] * len(row) for row in prompts], 0),
            "decoder_input_ids": pad_right(
                [[self._start, *row[:-1]] for row in targets], self._pad
            ),
            "decoder_attention_mask": pad_right([[1] * len(row) for row in targets], 0),
            "labels": pad_right(targets, IGNORED),
        }


def target_logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The logits that predict `batch["labels"]`, [rows, longest target, vocabulary].

    `batch` comes from `Collator`. Causal models that can (`logits_to_keep`) compute no others.
    """
    inputs: dict[str, Any] = {key: value for key, value in batch.items() if key != "labels"}
    if "decoder_input_ids" in batch:
        logits: Tensor = model(**inputs, use_cache=False).logits
        return logits
    kept = batch["labels"].shape[1] + 1
    if "logits_to_keep" in _accepted_by(model):
        inputs["logits_to_keep"] = kept
    logits = model(**inputs, use_cache=False).logits
    return logits[:, -kept:-1]


def _accepted_by(model: nn.Module) -> Any:
    inner: Any = model
    if isinstance(inner, DistributedDataParallel):
        inner = inner.module
    if isinstance(inner, PeftModel):
        inner = inner.get_base_model()
    return inspect.signature(inner.forward).parameters
