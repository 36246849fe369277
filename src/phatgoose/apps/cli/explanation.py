"""One prompt explained: the experts behind each token, for the terminal and as JSON."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...analysis.measures import heaviest
from ...analysis.routing_distribution import PARTS
from ...analysis.traces import Trace, TraceStream, trace
from ...config import Formatting
from ...routing.composition import routing_for
from ...routing.recording import summary_of
from ...tasks.encoding import Encoder
from ...tasks.task import Example
from ..console import coloured, expert_style
from ..generation import Sampling, check_prompt, check_text, generate


@dataclass(frozen=True)
class Explanation:
    """The trace of a text through a model, at the sites of one `layer` and `kind` (None: all)."""

    trace: Trace
    answer: str
    layer: str | None = None
    kind: str | None = None

    def coloured(self) -> Iterator[Text]:
        """For each stack that has such sites: its tokens in the colours of their first experts."""
        if self.trace.whole:
            told = ", ".join(f"{expert} {weight:.2f}" for expert, weight in self.trace.whole)
            yield Text(f"for the whole prompt: {told}\n")
        for stream, shares in self._views():
            top, mean = shares.argmax(axis=1), shares.mean(axis=0)
            labels = {
                z: f"{self.trace.experts[z]} {100 * mean[z]:.0f} %"
                for z in np.argsort(-mean, kind="stable").tolist()
                if (top == z).any()
            }
            bold = map(bool, stream.parts)
            yield coloured(zip(stream.tokens, top.tolist(), bold, strict=True), labels)

    def table(self, most: int = 3) -> Iterator[Table]:
        for stream, shares in self._views():
            table = Table(
                title=f"tokens of the {stream.name}" if len(self.trace.streams) > 1 else None
            )
            for column in ("token", "part", *map(str, range(1, most + 1)), "others"):
                table.add_column(column, no_wrap=True)
            for token, part, row in zip(stream.tokens, stream.parts, shares, strict=True):
                best = heaviest(row, most)
                cells = [
                    Text(f"{self.trace.experts[z]} {row[z]:.2f}", expert_style(z)) for z in best
                ]
                cells += [Text("")] * (most - len(cells))
                left = Text(f"{max(0.0, 1 - row[best].sum()):.2f}")
                table.add_row(Text(repr(token)[1:-1]), Text(PARTS[part]), *cells, left)
            yield table

    @property
    def summary(self) -> dict[str, float]:
        """Each expert's share of the tokens, at the sites of the layer and kind."""
        shares = np.concatenate([shares for _, shares in self._views()])
        return summary_of(self.trace.experts, torch.from_numpy(shares))

    def to_dict(self) -> dict[str, Any]:
        return {
            "router": self.trace.router,
            "answer": self.answer,
            "summary": self.summary,
            "layer": self.layer,
            "kind": self.kind,
            "tokens": [
                {
                    "stream": stream.name,
                    "part": PARTS[part],
                    "token": token,
                    "experts": {
                        self.trace.experts[z]: round(float(row[z]), 4)
                        for z in heaviest(row, len(row))
                    },
                }
                for stream, shares in self._views()
                for token, part, row in zip(stream.tokens, stream.parts, shares, strict=True)
            ],
            "trace": self.trace.to_dict(),
        }

    def _views(self) -> Iterator[tuple[TraceStream, Any]]:
        """(stream, weights [T, E]) of those streams that have sites of the layer and kind."""
        streams = [s for s in self.trace.streams if s.has(self.layer, self.kind)]
        for stream in streams or self.trace.streams[:1]:  # which then says what there is
            yield stream, stream.shares(len(self.trace.experts), self.layer, self.kind)


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

    The answer is the one `given`, or what the model generates greedily. A layer or kind that
    doesn't exist is refused when the explanation is shown.
    """
    check_prompt(prompt)
    check_text(given or "", "The answer")
    text = given
    if text is None:
        text = generate(model, tokenizer, prompt, formatting, Sampling(max_new_tokens)).text
    encoder = Encoder.for_model(model, tokenizer, formatting)
    pair = encoder.pair(prompt, text)
    if given is not None:  # `generate` has reported them already
        encoder.cuts([pair]).report("the prompt")
    asked = [Example(prompt, "")]
    # By the prompt, not by an answer after it.
    with routing_for(model, [pair.prompt], examples=asked, encoder=encoder):
        return Explanation(trace(model, encoder, pair), text, layer, kind)
