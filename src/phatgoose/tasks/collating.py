"""Batches of token pairs as model inputs, and the logits that predict their targets."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from .encoding import IGNORED, TokenPair, pad_left, pad_right, position_ids
from .row_packing import Text, can_pack, head_at, pack, packed_batches, quick_backward

__all__ = ["Collator", "target_logits"]


class Collator:
    """Batches of token pairs as model inputs, for one kind of model.

    Causal models get prompt and target in one left-padded row, so that all targets end in the last
    columns; sequence-to-sequence models get them apart. `labels` is [rows, longest target] in both
    cases, right-aligned or left-aligned accordingly, IGNORED where there is no target token.
    With `packs`, pairs share rows where the model can be packed: `labels` [1, tokens] are then all
    target tokens, `places` [tokens] where they are predicted, in any order of the pairs.
    """

    def __init__(self, model: PreTrainedModel, pad_token_id: int, *, packs: bool = False) -> None:
        self._pad, self._dtype = pad_token_id, model.dtype
        # Trainer cuts batches by rows where it finds several GPUs; places count all rows.
        self._packs = packs and can_pack(model) and torch.cuda.device_count() < 2
        self._is_encoder_decoder = bool(model.config.is_encoder_decoder)
        self._start: int = getattr(model.config, "decoder_start_token_id", None) or 0
        accepted = inspect.signature(model.forward).parameters
        self._wants_positions = "position_ids" in accepted

    def __call__(self, pairs: Sequence[TokenPair]) -> dict[str, Tensor]:
        """The pairs as tensors that `target_logits` and the model's forward take."""
        if self._packs:
            return self._packed(pairs)
        return self._seq2seq(pairs) if self._is_encoder_decoder else self._causal(pairs)

    def _packed(self, pairs: Sequence[TokenPair]) -> dict[str, Tensor]:
        """Nothing goes on from a target's last token, so it is a label only."""
        texts = [Text((pair.prompt + pair.target)[:-1]) for pair in pairs]
        (rows,) = packed_batches([text.length for text in texts], sys.maxsize)
        packed = pack([[texts[i] for i in row] for row in rows], self._pad, self._dtype)
        places, labels = list[int](), list[int]()
        for index, start in zip(
            [i for row in rows for i in row], packed.starts.tolist(), strict=True
        ):
            first = max(len(pairs[index].prompt), 1)  # a text's first token can't be predicted
            places += range(start + first - 1, start + texts[index].length)
            labels += (pairs[index].prompt + pairs[index].target)[first:]
        return {**packed.inputs, "labels": torch.tensor([labels]), "places": torch.tensor(places)}

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
    """The logits that predict `batch["labels"]`: its shape and the vocabulary's.

    `batch` comes from `Collator`. Causal models that can be packed compute no others, and those
    that can (`logits_to_keep`) few.
    """
    inputs: dict[str, Any] = {
        key: value for key, value in batch.items() if key not in ("labels", "places")
    }
    if "places" in batch:
        inner, columns = _unwrapped(model), batch["input_ids"].shape[1]
        with head_at(inner, batch["places"]), quick_backward(inner, columns):
            return _logits(model, inputs)
    if "decoder_input_ids" in batch:
        return _logits(model, inputs)
    kept = batch["labels"].shape[1] + 1
    if "logits_to_keep" in inspect.signature(_unwrapped(model).forward).parameters:
        inputs["logits_to_keep"] = kept
    return _logits(model, inputs)[:, -kept:-1]


def _logits(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    logits: Tensor = model(**inputs, use_cache=False).logits
    return logits


def _unwrapped(model: nn.Module) -> Any:
    """The transformers model inside what trains on several devices or with PEFT's layers."""
    inner: Any = model.module if isinstance(model, DistributedDataParallel) else model
    return inner.get_base_model() if isinstance(inner, PeftModel) else inner
