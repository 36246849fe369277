"""Tokens become text again, one piece for each."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

__all__ = ["UNFINISHED", "Detokeniser", "shown_as", "text_of", "texts_of"]

CONTEXT = 6  # tokens before the first one that decide whether it begins with a space
LONGEST_CHARACTER = 8  # tokens after which an unfinished character is shown as it is
UNFINISHED = "\ufffd"  # what stands for bytes that are no character yet


def texts_of(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> tuple[str, ...]:
    """Each token's part of the text that all of `tokens` make, as `shown_as` says."""
    detokeniser = Detokeniser(tokenizer)
    return tuple(shown_as(tokenizer, token, detokeniser.add(token)) for token in tokens)


def shown_as(tokenizer: PreTrainedTokenizerBase, token: int, piece: str) -> str:
    """`piece`, the text of `token` within another; where it has none its name if it is special.

    A character whose bytes are spread over several tokens is shown at the last of them; the others
    show U+FFFD.
    """
    alone = piece or text_of(tokenizer, token)
    return alone if piece or UNFINISHED not in alone else UNFINISHED


def text_of(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """What one token says by itself, special ones too."""
    return str(tokenizer.decode([token], clean_up_tokenization_spaces=False))


class Detokeniser:
    """Turns tokens into text, one piece for each token.

    A character whose bytes are spread over several tokens comes with the last of them. Special
    tokens have no text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, before: Sequence[int] = ()) -> None:
        """`before` are the tokens that the text follows; their own text is left out."""
        self._tokenizer = tokenizer
        self._tokens = list(before[-CONTEXT:])
        self._begin, self._done = 0, len(self._tokens)  # the window decoded, and what was returned

    def add(self, token: int) -> str:
        """The text that `token` adds; "" while a character is unfinished."""
        self._tokens.append(token)
        text = self._text(len(self._tokens))
        waits = text.endswith(UNFINISHED) and len(self._tokens) - self._done < LONGEST_CHARACTER
        return "" if waits else self._new(text)

    def rest(self) -> str:
        """The text of a character that was never finished."""
        return self._new(self._text(len(self._tokens)))

    def _new(self, text: str) -> str:
        new = text[len(self._text(self._done)) :]
        if new:
            self._begin, self._done = self._done, len(self._tokens)
        return new

    def _text(self, end: int) -> str:
        return str(
            self._tokenizer.decode(
                self._tokens[self._begin : end],
                skip_special_tokens=True,
                clean_up_tokenization_spaces=False,
            )
        )
