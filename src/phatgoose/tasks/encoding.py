"""From examples to tokens: prompts and targets.

A prompt has the same tokens whatever answer follows; an answer has those that it has when tokenised
together with its prompt. A causal model reads both in one row, a sequence-to-sequence model the
prompt in its encoder. All cutting to length happens here (`Formatting.truncation`). A text that is
a `Chat` is read through the base's chat template, whatever the formatting says.
"""

from __future__ import annotations

import logging
import warnings
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, TypeVar

from ..base.identity import Base
from ..config import Formatting
from ..errors import BaseModelError, TaskError
from ..files import one_line, reading
from ..sites import positions_of
from ..untrusted_text import UntrustedText
from .task import Chat, Example

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SPACES = ("Ġ", "▁", " ")  # how vocabularies write a token's leading space
CONTEXT = 48  # characters before an answer that can influence its tokens
CUTS = ("inputs", "inputs_cut")  # in an expert's metrics
MARK = "phatgoose"  # stands for a user's message in a chat template
WARN_FROM = 0.1  # warn from this share of cut inputs on
HEAD_SHARE = 4  # truncation middle: the head gets a quarter of the room, the tail the rest

text_process = lru_cache(maxsize=1)(UntrustedText)  # a command's, for its base

T = TypeVar("T")
Tokens = list[int]
Turn = tuple[str, str, Tokens]  # role, content, its tokens
logger = logging.getLogger(__name__)


def as_read(formatting: Formatting, examples: Sequence[Example]) -> Formatting:
    """The formatting that `examples` are read with: chats are in the template in any case."""
    if examples and all(isinstance(example.input, Chat) for example in examples):
        return replace(formatting, chat=True)
    return formatting


def cut_tokens(tokens: Sequence[T], room: int, truncation: str) -> list[T]:
    """At most `room` tokens: the last ones ("left"), the first ("right"), or both ends."""
    if len(tokens) <= room:
        return list(tokens)
    head = {"left": 0, "right": room}.get(truncation, room // HEAD_SHARE)
    return [*tokens[:head], *tokens[len(tokens) - (room - head) :]]


@dataclass(frozen=True)
class Fitted:
    """A tokenised input, or a target with its end of sequence.

    `cut` is how many of its tokens fitted, None if it is whole.
    """

    tokens: Tokens
    cut: int | None = None


@dataclass(frozen=True)
class TokenPair:
    """A tokenised prompt and target without padding; a cut is None if the part is whole."""

    prompt: Tokens
    target: Tokens
    cut: int | None = None
    target_cut: int | None = None

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.target)


@dataclass(frozen=True, eq=False)
class Encoder:
    """Turns texts into tokens for one base model; `positions` limits their number.

    Raises BaseModelError when a text needs a chat template and there is none.
    """

    tokenizer: PreTrainedTokenizerBase
    is_encoder_decoder: bool
    formatting: Formatting = field(default_factory=Formatting)
    positions: int | None = None

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
        is_seq2seq = bool(model.config.is_encoder_decoder)
        return cls(tokenizer, is_seq2seq, formatting or Formatting(), positions_of(model))

    def pair(self, input_text: str, target: str) -> TokenPair:
        answer = self.target(input_text, target)
        prompt = self.fitted(input_text, followed_by=len(answer.tokens))
        return TokenPair(prompt.tokens, answer.tokens, prompt.cut, answer.cut)

    def pairs(self, examples: Iterable[Example]) -> list[TokenPair]:
        return [self.pair(example.input, example.target) for example in examples]

    def prompt(self, text: str) -> Tokens:
        return self.fitted(text).tokens

    def fitted(self, text: str, *, followed_by: int = 0) -> Fitted:
        """The tokens of an input, cut to `max_input_tokens` and to the base's positions.

        In a causal model, `followed_by` positions stay free for what follows. Special tokens and
        the words of a chat template are never cut; a template counts against positions only. Raises
        TaskError when no position is left.
        """
        text = self.prompt_text(text)
        if self.in_template(text):
            return self._fitted_chat(text, followed_by)
        tokens = self._tokens(text)
        before, after = self._added
        around = len(before) + len(after)
        most = self._most(followed_by, around)
        left = cut_tokens(tokens, max(most - around, 0), self.formatting.truncation)
        cut = most if len(left) < len(tokens) else None
        return Fitted([*before, *left, *after], cut)

    def _fitted_chat(self, text: str, followed_by: int) -> Fitted:
        turns, around, prompt = self._chat(text)
        most = self._most(followed_by, around, around)
        how = self.formatting.truncation
        if len(prompt) - around <= most:
            return Fitted(prompt)

        def cut_to(level: int) -> Tokens:
            # A text that was cut inside a character may have more tokens when it is text again.
            cut = []
            for role, content, tokens in turns:
                if len(tokens) > level:
                    content = str(self.tokenizer.decode(cut_tokens(tokens, level, how)))
                cut.append((role, content))
            return self._tokens(self._rendered(Chat(cut)))

        # The longest turns are cut to one length: the most with which all together fit.
        longest = max(len(tokens) for _, _, tokens in turns)
        sizes = range(1, longest + 1)
        level = bisect_right(sizes, most + around, key=lambda size: len(cut_to(size)))
        return Fitted(cut_to(level), most)

    def target(self, input_text: str, text: str) -> Fitted:
        """The tokens of a target that follows `input_text`, cut on the right to what fits.

        A space separates it from a causal model's prompt, unless that ends in white space or is
        wrapped in a chat template. If prompt and target together have other tokens, the model reads
        those of each alone.
        """
        prompt, space = self._apart(input_text)
        with reading("The base's tokenizer, whose end of text a target needs,", BaseModelError):
            tokens = [*self._following(prompt, space + text), int(self.tokenizer.eos_token_id)]
        most = self.formatting.max_target_tokens
        places = self.positions
        if places is not None:
            if not self.is_encoder_decoder:  # beside the prompt and one token of the input
                if self.in_template(input_text):
                    _, around, _ = self._chat(input_text)
                else:
                    around = len(self._added[0])
                places -= 1 + around
            most = min(most, max(places, 1))
        if len(tokens) <= most:
            return Fitted(tokens)
        return Fitted([*tokens[: most - 1], tokens[-1]], most)

    def prompt_text(self, context: str) -> str:
        return self._apart(context)[0]

    def continuation(self, context: str, text: str) -> Tokens:
        """The tokens of `text` right after `context`, without an end."""
        prompt = self.prompt_text(context)
        return self._following(prompt, context[len(prompt) :] + text)

    def around_message(self) -> tuple[Tokens, str]:
        """(tokens up to a user's first message, the line after it) in the base's chat template.

        Raises BaseModelError where there is no such place: without a template, and in an
        encoder-decoder, which only answers.
        """
        writes = self.tokenizer.chat_template and not self.is_encoder_decoder
        text = self._rendered(Chat([("user", MARK)])) if writes else ""
        before, _, after = text.partition(MARK)
        start = self._tokens(before.rstrip(" "))  # a space is part of the word after it
        if not (start and after):
            raise BaseModelError("The base has no chat template to write prompts in; give some.")
        lines = filter(None, map(str.strip, after.split("\n")))
        return start, next(lines, after)

    def cuts(self, pairs: Sequence[TokenPair]) -> Cuts:
        return Cuts([pair.cut for pair in pairs], [pair.target_cut for pair in pairs])

    def _most(self, followed_by: int, around: int, outside: int = 0) -> int:
        """How many tokens an input may have, of those `around` it some being `outside`."""
        most = self.formatting.max_input_tokens
        places = self.positions
        if places is None:
            return most
        if not self.is_encoder_decoder:
            places -= followed_by
        if places <= around:
            raise TaskError(
                f"The base has {self.positions} positions, and the answer takes "
                f"{followed_by} of them, which leaves none for an input; ask for a shorter answer."
            )
        return min(most, places - outside)

    @cached_property
    def _added(self) -> tuple[Tokens, Tokens]:
        return added_tokens(self.tokenizer, is_encoder_decoder=self.is_encoder_decoder)

    @cached_property
    def _keeps_spaces(self) -> bool:
        return not any(len(t) > 1 and t[0] in SPACES for t in self.tokenizer.get_vocab())

    def in_template(self, text: str) -> bool:
        """Whether `text` is read through the base's chat template."""
        return self.formatting.chat or isinstance(text, Chat)

    def _chat(self, text: str) -> tuple[list[Turn], int, Tokens]:
        """(turns, how many tokens are around what they say, the whole prompt)."""
        chat = text if isinstance(text, Chat) else Chat([("user", text)])
        prompt = self._tokens(self._rendered(chat))
        around = len(prompt)
        turns = []
        for role, content in chat.turns:
            tokens = self._tokens(content)
            around -= len(tokens)
            turns.append((role, content, tokens))
        return turns, around, prompt

    def _rendered(self, chat: Chat) -> str:
        process = text_process(self.tokenizer)
        return str(process.read([_messages(chat.turns)], add_generation_prompt=True)[0][0])

    def _apart(self, text: str) -> tuple[str, str]:
        """(the prompt's text, the white space between it and an answer)."""
        if self.is_encoder_decoder or self.in_template(text):
            return text, ""
        prompt = text
        if not self._keeps_spaces:
            # Where tokens begin with a space, the prompt's trailing ones are part of the answer's
            # first.
            prompt = text.rstrip(" ") or text
        space = text[len(prompt) :]
        if not (space or prompt[-1:].isspace()):
            space = " "
        return prompt, space

    def _following(self, prompt: str, text: str) -> Tokens:
        if self.is_encoder_decoder:
            return self._tokens(text)
        # Only the prompt's last words are tokenised again: they decide the answer's tokens.
        end = _end_of(self._end_of_chat if self.in_template(prompt) else prompt)
        context, joined = self._encoded([end, end + text])["input_ids"]
        # Some endings, such as two line breaks, become other tokens together with what follows.
        is_apart = joined[: len(context)] == context
        return list(joined[len(context) :]) if is_apart else self._tokens(text)

    @cached_property
    def _end_of_chat(self) -> str:
        return self._rendered(Chat([("user", "")]))

    def _tokens(self, text: str) -> Tokens:
        return list(self._encoded(text)["input_ids"])

    def _encoded(self, text: str | list[str]) -> Any:
        return self.tokenizer(text, add_special_tokens=False, verbose=False)


def said_in_tokens(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    """The text that `tokens` stand for, without special ones; of a chat what was said last.

    A chat is known by its template: what that writes around a user's only message. Where the tokens
    have it around them, the text between is what was said.
    """
    around = _around_message(tokenizer, repr(tokenizer.chat_template))
    if around is not None:
        before, after = around
        text = str(tokenizer.decode(list(tokens)))
        _, is_chat, message = text.removesuffix(after).rpartition(before)
        if is_chat and text.endswith(after):
            return message
    return str(tokenizer.decode(list(tokens), skip_special_tokens=True))


@lru_cache(maxsize=8)
def _around_message(tokenizer: PreTrainedTokenizerBase, template: str) -> tuple[str, str] | None:
    """What the chat template writes around the last message of a user.

    None where nothing before it tells it from what else was said. `template` is the tokenizer's,
    which may change.
    """
    if not tokenizer.chat_template:
        return None
    messages = _messages([("user", ""), ("assistant", ""), ("user", MARK)])
    try:
        process = text_process(tokenizer)
        rendered = process.read([messages, messages[-1:]], add_generation_prompt=True)
    except BaseModelError:  # it wants other turns
        return None
    # As decoded: some tokenizers add spaces.
    several, alone = (str(tokenizer.decode(tokens)) for _, _, tokens in rendered)
    before, _, after = several.partition(MARK)
    first, _, _ = alone.partition(MARK)
    # Only before the first message the template writes more, such as a system prompt of its own.
    shared = 0
    for one, other in zip(reversed(before), reversed(first), strict=False):
        if one != other:
            break
        shared += 1
    return (before[-shared:], after) if shared else None


def _messages(turns: Iterable[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


def added_tokens(
    tokenizer: PreTrainedTokenizerBase, *, is_encoder_decoder: bool
) -> tuple[Tokens, Tokens]:
    """(tokens, tokens) that the tokenizer adds around a prompt; none after a causal one."""
    tokens = list(tokenizer("a")["input_ids"])
    plain = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    start = 0
    for place in range(len(tokens) - len(plain), -1, -1):
        if tokens[place : place + len(plain)] == plain:
            start = place  # the first of all
    # A causal model continues the prompt, so an end after it is left out.
    after = tokens[start + len(plain) :] if is_encoder_decoder else []
    return tokens[:start], after


def _end_of(text: str) -> str:
    """The last words of `text`, enough to decide the tokens of what follows."""
    if len(text) <= CONTEXT:
        return text
    end = text[-CONTEXT:]
    return end.partition(" ")[2].lstrip(" ") or end


@dataclass(frozen=True)
class Cuts:
    """How much of each of a task's inputs fitted, None for one that is whole; and of `targets`."""

    inputs: Sequence[int | None] = ()
    targets: Sequence[int | None] = ()

    def report(self, task: str) -> None:
        """Log the cuts of `task`; warn from WARN_FROM on, and of cut targets."""
        for fitted, what in ((self.inputs, "input"), (self.targets, "target")):
            cut = _cut(fitted)
            if not cut:
                continue
            if len(fitted) > 1:
                what += "s"
            text = f"{one_line(task)}: {len(cut)} of {len(fitted)} {what} cut to {max(cut)} tokens"
            if what.startswith("input") and len(cut) < WARN_FROM * len(fitted):
                logger.info(text)
            else:
                warnings.warn(f"{text}.", stacklevel=2)

    def record(self) -> dict[str, int]:
        """How many inputs there were, and how many were cut."""
        return dict(zip(CUTS, (len(self.inputs), len(_cut(self.inputs))), strict=True))


def _cut(fitted: Iterable[int | None]) -> Tokens:
    return [most for most in fitted if most is not None]
