"""One prompt explained: who served each of its tokens, for the terminal and as JSON."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...analysis.routing_distribution import PARTS
from ...analysis.traces import Trace, TraceStream, trace
from ...config import Formatting
from ...errors import TaskError
from ...tasks.encoding import Encoder
from ..generation import Sampling, answer, expert_style

__all__ = ["Explanation", "explain"]


@dataclass(frozen=True)
class Explanation:
    """A text's way through a model, seen at the sites of one `layer` and `kind` (None: all)."""

    trace: Trace
    answer: str
    layer: str | None = None
    kind: str | None = None

    def coloured(self) -> Iterator[Text]:
        """For each stack that has such sites: its tokens in the colours of their first experts.

        Bold tokens are the answer. A legend tells the share of each expert in all tokens.
        """
        for stream, shares in self._views():
            text = Text()
            top = shares.argmax(axis=1)
            for token, part, expert in zip(stream.tokens, stream.parts, top, strict=True):
                style = expert_style(int(expert)) + (" bold" if part else "")
                text.append(_printable(token), style=style)
            text.append("\n\n")
            mean = shares.mean(axis=0)
            for expert in np.argsort(-mean, kind="stable"):
                if (top == expert).any():
                    label = f" {self.trace.experts[expert]} {100 * mean[expert]:.0f} % "
                    text.append(label, style=f"reverse {expert_style(int(expert))}")
                    text.append(" ")
            yield text

    def table(self, most: int = 3) -> Iterator[Table]:
        """For each such stack: a row per token with its `most` experts of greatest weight."""
        for stream, shares in self._views():
            table = Table(title=f"tokens of the {stream.name}" if self._has_several else None)
            for column in ("token", "part", *map(str, range(1, most + 1)), "others"):
                table.add_column(column, no_wrap=True)
            for token, part, row in zip(stream.tokens, stream.parts, shares, strict=True):
                best = _best(row, most)
                cells = [
                    Text(f"{self.trace.experts[z]} {row[z]:.2f}", expert_style(z)) for z in best
                ]
                cells += [Text("")] * (most - len(cells))
                left = Text(f"{max(0.0, 1 - row[best].sum()):.2f}")
                table.add_row(Text(repr(token)[1:-1]), Text(PARTS[part]), *cells, left)
            yield table

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: each token's weights, by expert, and the whole trace."""
        return {
            "router": self.trace.router,
            "answer": self.answer,
            "layer": self.layer,
            "kind": self.kind,
            "tokens": [
                {
                    "stream": stream.name,
                    "part": PARTS[part],
                    "token": token,
                    "experts": {
                        self.trace.experts[z]: round(float(row[z]), 4) for z in _best(row, len(row))
                    },
                }
                for stream, shares in self._views()
                for token, part, row in zip(stream.tokens, stream.parts, shares, strict=True)
            ],
            "trace": self.trace.to_dict(),
        }

    @property
    def _has_several(self) -> bool:
        return len(self.trace.streams) > 1

    def _views(self) -> Iterator[tuple[TraceStream, Any]]:
        """(stream, weights [T, E]) of those streams that have sites of the layer and kind."""
        streams = [s for s in self.trace.streams if s.has(self.layer, self.kind)]
        for stream in streams or self.trace.streams[:1]:  # which then says what there is
            yield stream, stream.shares(len(self.trace.experts), self.layer, self.kind)


def _printable(token: str) -> str:
    """The token without characters that would steer the terminal."""
    return "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in token)


def _best(row: Any, most: int) -> list[int]:
    """The experts of greatest weight, at most so many, none of weight 0."""
    ranked = np.argsort(-row, kind="stable")[:most]
    return [int(z) for z in ranked if row[z] > 0]


def explain(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    given: str | None = None,
    *,
    formatting: Formatting | None = None,
    max_new_tokens: int = 16,
    layer: str | None = None,
    kind: str | None = None,
) -> Explanation:
    """How the routed `model` serves `prompt` and the answer after it, seen at a layer and a kind.

    The answer is the one `given`, or what the model generates greedily. Raises TaskError for an
    empty prompt, RoutingError when the model is not routed; a layer or kind that doesn't exist is
    refused when the explanation is shown.
    """
    if not prompt:
        raise TaskError("The prompt is empty.")
    told = given is None  # by `answer`
    if given is None:
        given = answer(model, tokenizer, prompt, formatting, Sampling(max_new_tokens)).text
    encoder = Encoder.for_model(model, tokenizer, formatting)
    pair = encoder.pair(prompt, given)
    if not told:
        encoder.cuts([pair]).report("the prompt")
    return Explanation(trace(model, encoder, pair), given, layer, kind)
