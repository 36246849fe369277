"""Text out of tokens that come one at a time, and where it has to end."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

__all__ = ["Detokeniser", "earliest", "held_back"]

CONTEXT = 6  # tokens before the first one that decide whether it begins with a space
LONGEST_CHARACTER = 8  # tokens after which an unfinished character is given up
UNFINISHED = "\ufffd"


class Detokeniser:
    """The text of tokens, piece by piece: what each adds to the text that all of them make.

    A character whose bytes are spread over several tokens comes with the last of them. Special
    tokens have no text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, before: Sequence[int] = ()) -> None:
        """`before` are tokens that stand before the first one and whose text is not wanted."""
        self._tokenizer = tokenizer
        self._tokens = list(before[-CONTEXT:])
        self._begin, self._told = 0, len(self._tokens)  # the window decoded, and what was given out

    def add(self, token: int) -> str:
        """What `token` adds; "" while a character is unfinished."""
        self._tokens.append(token)
        text = self._text(len(self._tokens))
        waits = text.endswith(UNFINISHED) and len(self._tokens) - self._told < LONGEST_CHARACTER
        return "" if waits else self._new(text)

    def rest(self) -> str:
        """What was held back at the end: characters that were never finished."""
        return self._new(self._text(len(self._tokens)))

    def _new(self, text: str) -> str:
        new = text[len(self._text(self._told)) :]
        if new:
            self._begin, self._told = self._told, len(self._tokens)
        return new

    def _text(self, end: int) -> str:
        return str(
            self._tokenizer.decode(
                self._tokens[self._begin : end],
                skip_special_tokens=True,
                clean_up_tokenization_spaces=False,
            )
        )


def earliest(text: str, stops: Sequence[str], begin: int) -> int | None:
    """Where the first of `stops` begins in `text`, looked for from `begin` on; None if nowhere."""
    found = [place for stop in stops if (place := text.find(stop, max(0, begin))) >= 0]
    return min(found, default=None)


def held_back(text: str, stops: Sequence[str]) -> int:
    """How many characters at the end of `text` may be the beginning of one of `stops`."""
    longest = max((len(stop) for stop in stops), default=1) - 1
    for length in range(min(longest, len(text)), 0, -1):
        if any(stop.startswith(text[-length:]) for stop in stops):
            return length
    return 0
