"""From examples to tokens: prompts and targets.

A prompt has the same tokens whatever answer follows it, and an answer has the tokens that it has
when tokenised together with its prompt. A causal model reads prompt and target in one row; a
sequence-to-sequence model reads the prompt in its encoder and the target in its decoder. Targets
end with the end-of-sequence token. All cutting to length happens here (`Formatting.truncation`).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..base.loading import Base
from ..base.sites import Positions, positions_of
from ..base.untrusted_text import render_chat
from ..config import Formatting
from ..errors import TaskError
from .cuts import Cut, Cuts, cut_tokens
from .task import Example, Span

SPACES = ("Ġ", "▁", " ")  # how vocabularies write a token's leading space
CONTEXT = 48  # characters before an answer that can influence its tokens


@dataclass(frozen=True)
class Prompt:
    """A tokenised input; `cut` is None if it is whole."""

    tokens: list[int]
    cut: Cut | None = None


@dataclass(frozen=True)
class Target:
    """A tokenised target, end-of-sequence included; `cut` is None if it is whole."""

    tokens: list[int]
    cut: Cut | None = None


@dataclass(frozen=True)
class TokenPair:
    """A tokenised prompt and target without padding.

    `cut` is None if the prompt is whole, `target_cut` if the target is.
    """

    prompt: list[int]
    target: list[int]
    cut: Cut | None = None
    target_cut: Cut | None = None

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.target)


class Encoder:
    """Turns texts into tokens for one base model; `positions` limits their number.

    Raises TaskError when the formatting asks for a chat template and the base has none.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        is_encoder_decoder: bool,
        formatting: Formatting | None = None,
        positions: Positions | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.is_encoder_decoder = is_encoder_decoder
        self.formatting = formatting or Formatting()
        self.positions = positions or Positions()
        if tokenizer.eos_token_id is None:
            raise TaskError("The base model's tokenizer has no end-of-sequence token.")
        if self.formatting.chat and not tokenizer.chat_template:
            raise TaskError("chat is on, but the base model's tokenizer has no chat template.")
        self._before, self._after = added_tokens(tokenizer, is_encoder_decoder=is_encoder_decoder)

    @classmethod
    def of(cls, base: Base, formatting: Formatting | None = None) -> Encoder:
        return cls.for_model(base.model, base.tokenizer, formatting)

    @classmethod
    def for_model(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        formatting: Formatting | None = None,
    ) -> Encoder:
        return cls(
            tokenizer,
            is_encoder_decoder=bool(model.config.is_encoder_decoder),
            formatting=formatting,
            positions=positions_of(model),
        )

    def pair(self, input_text: str, target: str, passage: Span | None = None) -> TokenPair:
        """Prompt and target of one example; see `fitted` and `target`."""
        answer = self.target(input_text, target)
        prompt = self.fitted(input_text, passage, followed_by=len(answer.tokens))
        return TokenPair(prompt.tokens, answer.tokens, prompt.cut, answer.cut)

    def pairs(self, examples: Iterable[Example]) -> list[TokenPair]:
        return [self.pair(each.input, each.target, each.passage) for each in examples]

    def prompt(self, text: str) -> list[int]:
        """The tokens of an input without a known passage; see `fitted`."""
        return self.fitted(text).tokens

    def fitted(self, text: str, passage: Span | None = None, *, followed_by: int = 0) -> Prompt:
        """The tokens of an input, cut to `max_input_tokens` and to the base's positions.

        In a causal model, `followed_by` positions stay free for what follows the input. Tokens that
        the tokenizer adds stay (BOS, T5's final </s>), except an end before a causal model's
        answer. So do the words of a chat template, which count against positions only. Trailing
        spaces belong to the answer where the tokenizer makes one token of a space and a word. With
        truncation "middle", the middle of `passage` goes if that is enough, else that of the whole
        text. Raises TaskError when no position is left for the input.
        """
        text = self.prompt_text(text)
        tokens = self._tokens(text)
        most = self._most(followed_by)
        room = most - (0 if self.formatting.chat else len(self._before) + len(self._after))
        if len(tokens) <= room:
            return Prompt(self._wrapped(tokens, text))
        left = self._cut(text, tokens, passage, max(room, 0))
        return Prompt(self._wrapped(left), Cut(most, len(tokens) - len(left)))

    def target(self, input_text: str, text: str) -> Target:
        """The tokens of a target that follows `input_text`, cut on the right.

        At most `max_target_tokens` are kept, and no more than the base has positions for. A space
        separates a causal model's target from the prompt, unless the prompt ends in white space or
        is wrapped in a chat template. The target has the tokens that it has when tokenised together
        with the prompt. Warns where that would change the prompt's tokens.
        """
        prompt, space = self._apart(input_text)
        apart = self.is_encoder_decoder
        tokens = self._tokens(text) if apart else self._following(prompt, space + text)
        tokens = [*tokens, int(self.tokenizer.eos_token_id)]
        most, places = self.formatting.max_target_tokens, self.positions.answer
        if places is not None and not self.is_encoder_decoder:
            places -= self._around + 1  # for one token of the input
        if places is not None:
            most = min(most, max(places, 1))
        if len(tokens) <= most:
            return Target(tokens)
        return Target([*tokens[: most - 1], tokens[-1]], Cut(most, len(tokens) - most))

    def prompt_text(self, context: str) -> str:
        """The prompt's part of `context`: trailing spaces may belong to the answer (`fitted`)."""
        return self._apart(context)[0]

    def continuation(self, context: str, text: str) -> list[int]:
        """The tokens of `text` right after `context`, without an end. Warns as `target` does."""
        if self.is_encoder_decoder:
            return self._tokens(text)
        prompt = self.prompt_text(context)
        return self._following(prompt, context[len(prompt) :] + text)

    def cuts(self, pairs: Sequence[TokenPair]) -> Cuts:
        """How prompts and targets of `pairs` were cut, and how many exceed the trained length."""
        lengths = [pair.length for pair in pairs]
        targets = [pair.target_cut for pair in pairs]
        cuts = [pair.cut for pair in pairs]
        return Cuts.of(cuts, lengths, self.positions.trained, targets=targets)

    def _most(self, followed_by: int) -> int:
        """The maximum tokens of a prompt, or of its text in a chat template."""
        most, places = self.formatting.max_input_tokens, self.positions.prompt
        if places is None:
            return most
        if not self.is_encoder_decoder:
            places -= followed_by
        if places <= self._around:
            raise TaskError(
                f"The base has {self.positions.prompt} positions, and the answer takes "
                f"{followed_by} of them, which leaves none for an input; ask for a shorter answer."
            )
        return min(most, places - (self._around if self.formatting.chat else 0))

    def _cut(self, text: str, tokens: list[int], passage: Span | None, room: int) -> list[int]:
        how = self.formatting.truncation
        if passage is not None and how == "middle" and self.tokenizer.is_fast:
            places = self._encoded(text, return_offsets_mapping=True)["offset_mapping"]
            inside = [i for i, (a, b) in enumerate(places) if passage[0] <= a < b <= passage[1]]
            first, end = (inside[0], inside[-1] + 1) if inside else (0, 0)
            space = room - (len(tokens) - (end - first))
            if space > 0:
                return [*tokens[:first], *cut_tokens(tokens[first:end], space, how), *tokens[end:]]
        return cut_tokens(tokens, room, how)

    def _wrapped(self, tokens: list[int], text: str | None = None) -> list[int]:
        """The prompt around `tokens`, which are all of `text` unless that is None."""
        if not self.formatting.chat:
            return [*self._before, *tokens, *self._after]
        return self._tokens(self._chat(self.tokenizer.decode(tokens) if text is None else text))

    @cached_property
    def _keeps_spaces(self) -> bool:
        """True when a space is always a token of its own, so that a prompt may end in one."""
        return not any(len(t) > 1 and t[0] in SPACES for t in self.tokenizer.get_vocab())

    @cached_property
    def _around(self) -> int:
        """The number of tokens that a prompt adds to its input."""
        return len(self._wrapped([]))

    @cached_property
    def _end_of_chat(self) -> str:
        return _end_of(self._chat(""))

    def _chat(self, text: str) -> str:
        messages = [{"role": "user", "content": text}]
        return render_chat(self.tokenizer, messages)

    def _apart(self, text: str) -> tuple[str, str]:
        """(the prompt's text, the white space between it and an answer)."""
        if self.is_encoder_decoder or self.formatting.chat:
            return text, ""
        prompt = text if self._keeps_spaces else text.rstrip(" ") or text
        return prompt, text[len(prompt) :] or ("" if prompt[-1:].isspace() else " ")

    def _following(self, prompt: str, text: str) -> list[int]:
        end = self._end_of_chat if self.formatting.chat else _end_of(prompt)
        context, joined = self._encoded([end, end + text])["input_ids"]
        if joined[: len(context)] == context:
            return list(joined[len(context) :])
        last = end[len(end.rstrip()) :] or end[-1:]
        warnings.warn(
            f"After a prompt that ends in {last!r}, the tokenizer makes other tokens of prompt and "
            f"answer together than of each separately; the model reads the separate ones. Prompts "
            f"that end without white space, or in a single space, avoid this.",
            stacklevel=3,
        )
        return self._tokens(text)

    def _tokens(self, text: str) -> list[int]:
        return list(self._encoded(text)["input_ids"])

    def _encoded(self, text: str | list[str], **options: Any) -> Any:
        """The tokenizer's output for `text` alone; its warnings about length don't apply."""
        return self.tokenizer(text, add_special_tokens=False, verbose=False, **options)


def added_tokens(
    tokenizer: PreTrainedTokenizerBase, *, is_encoder_decoder: bool
) -> tuple[list[int], list[int]]:
    """(tokens, tokens) that the tokenizer adds before and after a prompt.

    A causal model continues the prompt, so for it those after it, such as an end of sequence, are
    left out.
    """
    whole = list(tokenizer("a")["input_ids"])
    plain = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    starts = range(len(whole) - len(plain) + 1)
    start = next((i for i in starts if whole[i : i + len(plain)] == plain), 0)
    return whole[:start], whole[start + len(plain) :] if is_encoder_decoder else []


def _end_of(text: str) -> str:
    """The last words of `text`, enough to decide the tokens of what follows."""
    if len(text) <= CONTEXT:
        return text
    end = text[-CONTEXT:]
    return end.partition(" ")[2].lstrip(" ") or end
