"""Batches as model inputs: token pairs collated, rows padded, rows grouped by length."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import BaseModelError
from ..files.quoting import shortened
from .encoding import TokenPair
from .row_packing import BranchedText, can_pack, pack_rows, packed_batches

__all__ = [
    "IGNORED",
    "Collator",
    "batches_of_tokens",
    "decoder_start",
    "pad_left",
    "pad_right",
    "position_ids",
]

IGNORED = -100  # the label that torch's cross-entropy leaves out


class Collator:
    """Collates token pairs into inputs for one kind of model.

    Causal models get prompt and target in one left-padded row, so that all targets end in the last
    columns; sequence-to-sequence models get them separately. `labels` is [rows, longest target],
    aligned right or left accordingly, IGNORED where there is no target token. With `packs`, pairs
    share rows where the model can be packed: `labels` [1, tokens] then holds all target tokens and
    `places` [tokens] the positions that predict them, in any order of the pairs. Raises
    BaseModelError as `decoder_start` does.
    """

    def __init__(self, model: PreTrainedModel, pad_token_id: int, *, packs: bool = False) -> None:
        self._pad, self._dtype = pad_token_id, model.dtype
        # On several GPUs Trainer splits batches by rows, but places count all rows.
        self._packs = packs and can_pack(model) and torch.cuda.device_count() < 2
        self._is_encoder_decoder = bool(model.config.is_encoder_decoder)
        # In a causal model a prompt's last token predicts an answer's first.
        self._start = decoder_start(model) if self._is_encoder_decoder else 0
        accepted = inspect.signature(model.forward).parameters
        self._wants_positions = "position_ids" in accepted

    def __call__(self, pairs: Sequence[TokenPair]) -> dict[str, Tensor]:
        """The pairs as tensors that `target_logits` and the model's forward take."""
        if self._packs:
            return self._packed(pairs)
        return self._seq2seq(pairs) if self._is_encoder_decoder else self._causal(pairs)

    def _packed(self, pairs: Sequence[TokenPair]) -> dict[str, Tensor]:
        """A target's last token predicts nothing, so it is only a label."""
        texts = [BranchedText((pair.prompt + pair.target)[:-1]) for pair in pairs]
        (rows,) = packed_batches([text.length for text in texts], sys.maxsize)
        packed = pack_rows([[texts[i] for i in row] for row in rows], self._pad, self._dtype)
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


def decoder_start(model: PreTrainedModel) -> int:
    """The id of the token that the answers of a sequence-to-sequence `model` begin with.

    Raises BaseModelError where its config names none: any guess would train or score other answers
    than the base was made for.
    """
    start: int | None = getattr(model.config, "decoder_start_token_id", None)
    if start is None:
        raise BaseModelError(
            f"Base model {shortened(model.name_or_path)} has no decoder_start_token_id, the token "
            f"that its answers begin with; set it in the config.json of a local copy (T5's is "
            f"its pad_token_id)."
        )
    return start


def pad_left(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """The rows as one [rows, longest] tensor, padded with `value` on the left."""
    longest = max((len(row) for row in rows), default=0)
    return torch.tensor([[value] * (longest - len(row)) + list(row) for row in rows])


def pad_right(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """The rows as one [rows, longest] tensor, padded with `value` on the right."""
    longest = max((len(row) for row in rows), default=0)
    return torch.tensor([list(row) + [value] * (longest - len(row)) for row in rows])


def position_ids(attention_mask: Tensor) -> Tensor:
    """Positions [rows, columns] that count real tokens only, so padding does not shift a text."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def batches_of_tokens(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Batches of indices of rows of similar length, each at most `budget` tokens when padded.

    Every row comes once, a row longer than the budget alone. The longest come first, so that memory
    runs out early or never.
    """
    order = sorted(range(len(lengths)), key=lambda i: lengths[i], reverse=True)
    batch: list[int] = []
    for index in order:
        if batch and (len(batch) + 1) * lengths[batch[0]] > budget:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
