"""Prompts read: the keys and values of new rows, and what is told about the prompts' tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from ....analysis.traces import TraceKeeper
from ....tasks.encoding import pad_left
from .caches import Cache
from .decoding import Alternative, alternatives
from .model_runner import ModelRunner
from .sequences import ANSWER, PROMPT, ActiveSequence

__all__ = ["ReadPrompts", "read_prompts", "rows_of"]

# Logits where log-probabilities of the prompts are wanted: at most so many at a time, by reading
# the prompts in several passes.
MOST_LOGITS = 1 << 26


@dataclass
class ReadPrompts:
    """What is known of rows whose prompts were read, in their order.

    `mask` [rows, columns] tells the prompts' padding, `logits` [rows, V] are those after the last
    token, `encoded` is an encoder-decoder model's.
    """

    cache: Cache
    mask: Tensor
    logits: Tensor
    encoded: BaseModelOutput | None = None


def read_prompts(runner: ModelRunner, rows: Sequence[ActiveSequence]) -> ReadPrompts:
    """`rows`' prompts read together, each different one once."""
    first = {row.prompt: row for row in reversed(rows)}
    prompts = list(first)
    runner.serve_lookup(list(first.values()))
    ids = pad_left(prompts, runner.pad).to(runner.device)
    mask = pad_left([[1] * len(prompt) for prompt in prompts], 0).to(runner.device)
    owners = [[row for row in rows if row.prompt == prompt] for prompt in prompts]
    read = _read_and_encode if runner.is_encoder_decoder else _read
    found = read(runner, ids, mask, owners)
    places = torch.tensor([prompts.index(row.prompt) for row in rows], device=runner.device)
    found.cache.batch_select_indices(places)
    return ReadPrompts(
        found.cache, mask[places], found.logits[places], rows_of(found.encoded, places)
    )


def rows_of(encoded: BaseModelOutput | None, places: Tensor) -> BaseModelOutput | None:
    """The rows at `places` of what an encoder made."""
    if encoded is None:
        return None
    return BaseModelOutput(last_hidden_state=encoded.last_hidden_state[places])


def _read(
    runner: ModelRunner, ids: Tensor, mask: Tensor, owners: list[list[ActiveSequence]]
) -> ReadPrompts:
    """A causal model's reading: in one pass, or in several where all logits are looked at."""
    cache = runner.new_cache()
    scored = [any(row.decoding.scores_prompt for row in group) for group in owners]
    columns = ids.shape[1]
    wide = max(1, MOST_LOGITS // (len(ids) * runner.vocabulary)) if any(scored) else columns
    scores: list[list[tuple[Alternative, tuple[Alternative, ...]]]] = [[] for _ in owners]
    for begin in range(0, columns, wide):
        end = min(begin + wide, columns)
        keeper = _keeper(owners)
        logits = runner.decode(
            ids[:, begin:end], mask[:, :end], cache, keeper, all_logits=any(scored)
        )
        for number, group in enumerate(owners):
            pad = columns - len(group[0].prompt)
            if scored[number]:
                most = max(row.decoding.logprobs or 0 for row in group)
                targets = ids[number, max(begin, pad) + 1 : end + 1].tolist()
                seen = logits[number, max(0, pad - begin) :][: len(targets)]
                scores[number] += alternatives(seen, targets, most)
        if keeper is not None:
            _tell_routing(keeper, runner, owners, begin, end, columns)
    for number, group in enumerate(owners):
        for row in group:
            if row.decoding.scores_prompt:
                row.tell_prompt(scores[number])
    return ReadPrompts(cache, mask, logits[:, -1].float())


def _read_and_encode(
    runner: ModelRunner, ids: Tensor, mask: Tensor, owners: list[list[ActiveSequence]]
) -> ReadPrompts:
    """An encoder-decoder model's reading: the encoder's pass, then the decoder's first token."""
    cache, keeper = runner.new_cache(), _keeper(owners)
    encoded = runner.encode(ids, mask, keeper)
    start = torch.full_like(ids[:, :1], runner.model.config.decoder_start_token_id)
    logits = runner.answer(start, mask, encoded, cache, keeper)
    if keeper is not None:
        _tell_routing(keeper, runner, owners, 0, ids.shape[1], ids.shape[1])
    return ReadPrompts(cache, mask, logits[:, -1].float(), encoded)


def _keeper(owners: list[list[ActiveSequence]]) -> TraceKeeper | None:
    wanted = any(row.decoding.routing for group in owners for row in group)
    return TraceKeeper() if wanted else None


def _tell_routing(
    keeper: TraceKeeper,
    runner: ModelRunner,
    owners: list[list[ActiveSequence]],
    begin: int,
    end: int,
    columns: int,
) -> None:
    """Hand each row the routing of its prompt's tokens from column `begin` to `end` of `columns`.

    The decoder of an encoder-decoder model has read the token that begins an answer.
    """
    width = end - begin
    for name, stream in keeper.streams().items():
        starts = runner.is_encoder_decoder and name == "decoder"
        for number, group in enumerate(owners):
            for row in (row for row in group if row.decoding.routing):
                if starts:
                    pieces = row.pieces([runner.model.config.decoder_start_token_id])
                    row.passed([stream.some(slice(number, number + 1), pieces, [ANSWER])])
                    continue
                pad = columns - len(row.prompt)
                first = max(begin, pad)
                pieces = row.pieces(row.prompt)[first - pad : max(0, end - pad)]
                if pieces:
                    chosen = slice(number * width + first - begin, (number + 1) * width)
                    row.passed([stream.some(chosen, pieces, [PROMPT] * len(pieces))])
