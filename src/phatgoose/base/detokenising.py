"""Tokens become text, one by one, as they come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


CONTEXT = 6  # tokens before the first one that decide whether it begins with a space
LONGEST_CHARACTER = 8  # tokens after which an unfinished character is shown as it is
UNFINISHED = "\ufffd"  # what stands for bytes that are no character yet


def texts_of(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> tuple[str, ...]:
    """Each token's part of the text that all of `tokens` make, as `shown_as` says."""
    detokeniser = Detokeniser(tokenizer)
    return tuple(shown_as(tokenizer, token, detokeniser.add(token)) for token in tokens)


def shown_as(tokenizer: PreTrainedTokenizerBase, token: int, piece: str) -> str:
    """`piece`, or where it is empty the token's own name if special, else U+FFFD."""
    if piece:
        return piece
    alone = text_of(tokenizer, token)
    return UNFINISHED if UNFINISHED in alone else alone


def text_of(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    return str(tokenizer.decode([token], clean_up_tokenization_spaces=False))


class Detokeniser:
    """Turns tokens into text; a character of several tokens comes with the last of them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, before: Sequence[int] = ()) -> None:
        """`before` are the tokens that the text follows; their own text is left out."""
        self._tokenizer = tokenizer
        self._tokens = list(before[-CONTEXT:])
        self._begin = 0  # of the tokens that are decoded
        self._done = len(self._tokens)  # of which the text was returned

    def add(self, token: int) -> str:
        self._tokens.append(token)
        text = self._text()
        may_wait = len(self._tokens) - self._done < LONGEST_CHARACTER
        return "" if may_wait and text.endswith(UNFINISHED) else self._new(text)

    def rest(self) -> str:
        return self._new(self._text())

    def _new(self, text: str) -> str:
        new = text[len(self._text(self._done)) :]
        if new:
            self._begin = self._done
            self._done = len(self._tokens)
        return new

    def _text(self, end: int | None = None) -> str:
        return str(
            self._tokenizer.decode(
                self._tokens[self._begin : end],
                skip_special_tokens=True,
                clean_up_tokenization_spaces=False,
            )
        )
