"""Text from tokens that come one at a time, and stop texts."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

__all__ = ["Detokeniser", "earliest", "held_back"]

CONTEXT = 6  # tokens before the first one that decide whether it begins with a space
LONGEST_CHARACTER = 8  # tokens after which an unfinished character is shown as it is
UNFINISHED = "\ufffd"


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


def earliest(text: str, stops: Sequence[str], begin: int) -> int | None:
    """Where the first of `stops` in `text` begins, searched from `begin` on; None if nowhere."""
    found = [index for stop in stops if (index := text.find(stop, max(0, begin))) >= 0]
    return min(found, default=None)


def held_back(text: str, stops: Sequence[str]) -> int:
    """How many characters at the end of `text` may be the beginning of one of `stops`."""
    longest = max((len(stop) for stop in stops), default=1) - 1
    for length in range(min(longest, len(text)), 0, -1):
        if any(stop.startswith(text[-length:]) for stop in stops):
            return length
    return 0
