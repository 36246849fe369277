"""A batch: the rows that one model computes together, a token each per step.

Rows join between two steps, once their prompts have been read, and leave when they are finished.
An encoder-decoder model's rows begin together and nobody joins later, since some such models count
positions by the batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers.modeling_outputs import BaseModelOutput

from ....analysis.traces import TraceKeeper
from .caches import drop_columns, join
from .model_runner import ModelRunner
from .prefill import read_prompts, rows_of
from .sequences import ANSWER, ActiveSequence

__all__ = ["Batch"]


class Batch:
    """Rows of one model, with their keys and values."""

    def __init__(self, runner: ModelRunner) -> None:
        self.runner = runner
        self.rows: list[ActiveSequence] = []
        self._cache = runner.new_cache()
        self._mask = torch.ones(0, 0)  # [rows, columns]: of all tokens held, or of the encoder's
        self._encoded: BaseModelOutput | None = None

    @property
    def takes_rows(self) -> bool:
        """True if rows may join now."""
        return not self.rows or not self.runner.is_encoder_decoder

    def tokens_with(self, newcomers: Sequence[ActiveSequence] = ()) -> int:
        """Tokens held when the longest row ends, padding included, if `newcomers` join."""
        rows = [*self.rows, *newcomers]
        return len(rows) * max((row.most_tokens for row in rows), default=0)

    def join(self, newcomers: Sequence[ActiveSequence]) -> None:
        """Read the prompts of `newcomers`, take them in and choose the first token of each."""
        runner = self.runner
        for row in newcomers:
            row.begin(
                runner.tokenizer,
                runner.ends,
                runner.device,
                answers_alone=runner.is_encoder_decoder,
            )
        read = read_prompts(runner, newcomers)
        if self.rows:
            join(self._cache, read.cache)
            columns = max(self._mask.shape[1], read.mask.shape[1])
            both = (
                torch.nn.functional.pad(mask, (columns - mask.shape[1], 0))
                for mask in (self._mask, read.mask)
            )
            self._mask = torch.cat(list(both))
        else:
            self._cache, self._mask, self._encoded = read.cache, read.mask, read.encoded
        self.rows += newcomers
        for row, logits in zip(newcomers, read.logits, strict=True):
            row.advance(logits)
        self.drop_finished()

    def step(self) -> None:
        """One more token for every row."""
        runner = self.runner
        ids = torch.tensor([[row.generated[-1]] for row in self.rows], device=runner.device)
        keeper = TraceKeeper() if any(row.decoding.routing for row in self.rows) else None
        runner.serve_lookup(self.rows)
        if self._encoded is not None:
            logits = runner.answer(ids, self._mask, self._encoded, self._cache, keeper)
        else:
            self._mask = torch.cat([self._mask, torch.ones_like(ids)], dim=1)
            logits = runner.decode(ids, self._mask, self._cache, keeper)
        if keeper is not None:
            self._tell_routing(keeper)
        for row, scores in zip(self.rows, logits[:, -1].float(), strict=True):
            row.advance(scores)
        self.drop_finished()

    def drop_finished(self) -> None:
        """Let go of rows that are over, and of columns that none of the others needs."""
        kept = [number for number, row in enumerate(self.rows) if not row.is_over]
        if len(kept) == len(self.rows):
            return
        self.rows = [self.rows[number] for number in kept]
        if not kept:
            self._cache, self._encoded = self.runner.new_cache(), None
            return
        places = torch.tensor(kept, device=self.runner.device)
        self._cache.batch_select_indices(places)
        self._mask, self._encoded = self._mask[places], rows_of(self._encoded, places)
        unused = int(self._mask.any(dim=0).long().argmax())
        if unused and self._encoded is None:
            drop_columns(self._cache, unused)
            self._mask = self._mask[:, unused:]

    def _tell_routing(self, keeper: TraceKeeper) -> None:
        """Hand each row the routing of the token that it chose last."""
        for stream in keeper.streams().values():
            for number, row in enumerate(self.rows):
                if row.decoding.routing:
                    row.passed([stream.some(slice(number, number + 1), row.shown[-1:], [ANSWER])])
