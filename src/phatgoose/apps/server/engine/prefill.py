"""Reading prompts: keys, values and what is reported about prompt tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from ....analysis.traces import TraceKeeper, TraceStream
from ....base.detokenising import texts_of
from ....tasks.collating import decoder_start, pad_left
from .caches import Cache
from .decoding import TokenScores, token_scores
from .model_runner import ModelRunner
from .sequences import ANSWER, PROMPT, ActiveSequence

__all__ = ["Prefilled", "encoded_rows", "keeper_for", "prefill"]

# Most logits in one pass where prompts are scored; longer prompts are read in several passes.
MOST_LOGITS = 1 << 26


@dataclass
class Prefilled:
    """What reading the prompts of some sequences gave, in their order.

    `mask` [rows, columns] is 0 at padding, `logits` [rows, V] are those after the last token,
    `encoded` is an encoder-decoder model's.
    """

    cache: Cache
    mask: Tensor
    logits: Tensor
    encoded: BaseModelOutput | None = None


def prefill(runner: ModelRunner, sequences: Sequence[ActiveSequence]) -> Prefilled:
    """Read the prompts of `sequences` together, each distinct one once."""
    sharing: dict[tuple[int, ...], list[ActiveSequence]] = {}
    for each in sequences:
        sharing.setdefault(each.prompt, []).append(each)
    distinct = _DistinctPrompts(runner, list(sharing.values()))
    runner.use_experts([group[0].experts for group in sharing.values()])
    found = distinct.read_and_encode() if runner.is_encoder_decoder else distinct.read()
    row_of = {prompt: row for row, prompt in enumerate(sharing)}
    rows = torch.tensor([row_of[each.prompt] for each in sequences], device=runner.device)
    found.cache.batch_select_indices(rows)
    encoded = encoded_rows(found.encoded, rows)
    return Prefilled(found.cache, found.mask[rows], found.logits[rows], encoded)


def encoded_rows(encoded: BaseModelOutput | None, rows: Tensor) -> BaseModelOutput | None:
    """Some rows of an encoder's output."""
    if encoded is None:
        return None
    return type(encoded)(last_hidden_state=encoded.last_hidden_state[rows])


def keeper_for(sequences: Sequence[ActiveSequence]) -> TraceKeeper | None:
    """What keeps a pass's routing, if one of `sequences` reports it."""
    return TraceKeeper() if any(each.decoding.routing for each in sequences) else None


class _DistinctPrompts:
    """A row for each distinct prompt; `owners` are the sequences that begin with it."""

    def __init__(self, runner: ModelRunner, owners: list[list[ActiveSequence]]) -> None:
        self._runner, self._owners = runner, owners
        self._everyone = [each for group in owners for each in group]
        prompts = [group[0].prompt for group in owners]
        self._ids = pad_left(prompts, runner.pad).to(runner.device)
        self._mask = pad_left([[1] * len(each) for each in prompts], 0).to(runner.device)
        self._padding = [self._ids.shape[1] - len(each) for each in prompts]

    def read(self) -> Prefilled:
        """Read with a causal model, in one pass, or in several where prompts are scored."""
        runner, (rows, columns) = self._runner, self._ids.shape
        cache = runner.new_cache()
        is_scored = any(each.decoding.scores_prompt for each in self._everyone)
        wide = max(1, MOST_LOGITS // (rows * runner.vocabulary)) if is_scored else columns
        scores: list[list[TokenScores]] = [[] for _ in self._owners]
        for begin in range(0, columns, wide):
            end = min(begin + wide, columns)
            keeper = keeper_for(self._everyone)
            ids, mask = self._ids[:, begin:end], self._mask[:, :end]
            logits = runner.decode(ids, mask, cache, keeper, all_logits=is_scored)
            for row in range(rows):
                scores[row] += self._scores(row, logits[row], begin, end)
            self._report_routing(keeper, begin, end)
        for row, group in enumerate(self._owners):
            for each in group:
                if each.decoding.scores_prompt:
                    each.emit_prompt(scores[row])
        return Prefilled(cache, self._mask, logits[:, -1].float())

    def _scores(self, row: int, logits: Tensor, begin: int, end: int) -> list[TokenScores]:
        """Scores of the tokens that follow the columns `begin` to `end`, given their `logits`."""
        wanting = [each for each in self._owners[row] if each.decoding.scores_prompt]
        if not wanting:
            return []
        most = max(each.decoding.logprobs or 0 for each in self._owners[row])
        pad = self._padding[row]
        targets = self._ids[row, max(begin, pad) + 1 : end + 1].tolist()
        return token_scores(logits[max(0, pad - begin) :][: len(targets)], targets, most)

    def read_and_encode(self) -> Prefilled:
        """Read with an encoder-decoder model: the encoder's pass and the decoder's first token."""
        runner = self._runner
        cache, keeper = runner.new_cache(), keeper_for(self._everyone)
        encoded = runner.encode(self._ids, self._mask, keeper)
        start = torch.full_like(self._ids[:, :1], decoder_start(runner.model))
        logits = runner.answer(start, self._mask, encoded, cache, keeper)
        self._report_routing(keeper, 0, self._ids.shape[1])
        return Prefilled(cache, self._mask, logits[:, -1].float(), encoded)

    def _report_routing(self, keeper: TraceKeeper | None, begin: int, end: int) -> None:
        """Give each sequence the routing of its prompt's tokens in the columns `begin` to `end`.

        An encoder-decoder model's decoder has read the token that begins an answer instead.
        """
        for name, stream in keeper.streams().items() if keeper is not None else ():
            is_start = self._runner.is_encoder_decoder and name == "decoder"
            for row, group in enumerate(self._owners):
                part = (
                    self._start_of(stream, row) if is_start else self._part(stream, row, begin, end)
                )
                for each in group:
                    if each.decoding.routing and part.tokens:
                        each.add_routing(part)

    def _start_of(self, stream: TraceStream, row: int) -> TraceStream:
        start = decoder_start(self._runner.model)
        pieces = texts_of(self._runner.tokenizer, [start])
        return stream.some(slice(row, row + 1), pieces, [ANSWER])

    def _part(self, stream: TraceStream, row: int, begin: int, end: int) -> TraceStream:
        """What `stream`, of the columns `begin` to `end`, has of the prompt in `row`."""
        pad, width, sequence = self._padding[row], end - begin, self._owners[row][0]
        first = max(begin, pad)
        pieces = texts_of(self._runner.tokenizer, sequence.prompt)[first - pad : max(0, end - pad)]
        chosen = slice(row * width + first - begin, (row + 1) * width)
        return stream.some(chosen, pieces, [PROMPT] * len(pieces))
