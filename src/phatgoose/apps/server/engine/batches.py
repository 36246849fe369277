"""Sequences that one model computes together, one token each per step.

Sequences join between two steps, once their prompts have been read, and leave when they are
finished. An encoder-decoder model's begin together and none joins later, since some such models
count positions by the batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers.modeling_outputs import BaseModelOutput

from ....analysis.traces import TraceKeeper
from .caches import drop_columns, join
from .model_runner import ModelRunner
from .prefill import encoded_rows, keeper_for, prefill
from .sequences import ANSWER, ActiveSequence

__all__ = ["Batch"]


class Batch:
    """Sequences of one model, a row each, with their keys and values."""

    def __init__(self, runner: ModelRunner) -> None:
        self.runner = runner
        self.sequences: list[ActiveSequence] = []
        self._cache = runner.new_cache()
        self._mask = torch.ones(0, 0)  # [rows, columns]: of all tokens held, or of the encoder's
        self._encoded: BaseModelOutput | None = None

    @property
    def is_open(self) -> bool:
        """True if sequences may join now."""
        return not self.sequences or not self.runner.is_encoder_decoder

    def tokens_with(self, newcomers: Sequence[ActiveSequence] = ()) -> int:
        """Tokens held, padding included, when the longest ends, if `newcomers` join."""
        together = [*self.sequences, *newcomers]
        return len(together) * max((each.most_tokens for each in together), default=0)

    def join(self, newcomers: Sequence[ActiveSequence]) -> None:
        """Read the prompts of `newcomers`, take them in and choose the first token of each."""
        read = prefill(self.runner, newcomers)
        if self.sequences:
            join(self._cache, read.cache)
            columns = max(self._mask.shape[1], read.mask.shape[1])
            both = (
                torch.nn.functional.pad(mask, (columns - mask.shape[1], 0))
                for mask in (self._mask, read.mask)
            )
            self._mask = torch.cat(list(both))
        else:
            self._cache, self._mask, self._encoded = read.cache, read.mask, read.encoded
        self.sequences += newcomers
        for sequence, logits in zip(newcomers, read.logits, strict=True):
            sequence.advance(logits)
        self.drop_finished()

    def step(self) -> None:
        """One more token for every sequence."""
        runner, sequences = self.runner, self.sequences
        ids = torch.tensor([[each.generated[-1]] for each in sequences], device=runner.device)
        keeper = keeper_for(sequences)
        runner.use_experts([each.experts for each in sequences])
        if self._encoded is not None:
            logits = runner.answer(ids, self._mask, self._encoded, self._cache, keeper)
        else:
            self._mask = torch.cat([self._mask, torch.ones_like(ids)], dim=1)
            logits = runner.decode(ids, self._mask, self._cache, keeper)
        if keeper is not None:
            self._report_routing(keeper)
        for sequence, scores in zip(sequences, logits[:, -1].float(), strict=True):
            sequence.advance(scores)
        self.drop_finished()

    def drop_finished(self) -> None:
        """Remove sequences that are over, and columns that none of the others needs."""
        kept = [row for row, each in enumerate(self.sequences) if not each.is_over]
        if len(kept) == len(self.sequences):
            return
        self.sequences = [self.sequences[row] for row in kept]
        if not kept:
            self._cache, self._encoded = self.runner.new_cache(), None
            return
        rows = torch.tensor(kept, device=self.runner.device)
        self._cache.batch_select_indices(rows)
        self._mask, self._encoded = self._mask[rows], encoded_rows(self._encoded, rows)
        unused = int(self._mask.any(dim=0).long().argmax())
        if unused and self._encoded is None:
            drop_columns(self._cache, unused)
            self._mask = self._mask[:, unused:]

    def _report_routing(self, keeper: TraceKeeper) -> None:
        """Give each sequence the routing of the token that it chose last."""
        for stream in keeper.streams().values():
            for row, sequence in enumerate(self.sequences):
                if sequence.decoding.routing:
                    last = stream.some(slice(row, row + 1), sequence.shown[-1:], [ANSWER])
                    sequence.add_routing(last)
