"""Answers in JSON: tokens that would break the form or a schema are left out, by llguidance.

Its matcher gives the tokens that may come next, and has limits of its own on the size of a schema
and the work of a step: a schema is a client's. It never raises, but says that it is in error.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ....errors import EngineError
from ....files import first_line
from ..protocol import ApiError, bad_request

try:
    from llguidance import LLMatcher
    from llguidance.hf import from_tokenizer
except ImportError:
    LLMatcher = from_tokenizer = None

FIELD = "response_format"
# As Python's json writes it: a small model that may write spaces writes nothing else.
WRITTEN = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}

_known: weakref.WeakKeyDictionary[PreTrainedTokenizerBase, Any] = weakref.WeakKeyDictionary()
_making = threading.Lock()


class JsonForm:
    """What may follow in one answer; `copy` begins another of the same form."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def copy(self) -> JsonForm:
        return JsonForm(self._matcher.deep_copy())

    def allowed(self, logits: Tensor) -> Tensor:
        """`logits` [V], minus infinity for tokens that can't follow. Raises EngineError."""
        marks = torch.frombuffer(bytearray(self._matcher.compute_logit_bias()), dtype=torch.uint8)
        self._check()
        allowed = torch.zeros(len(logits), dtype=torch.bool)
        allowed[: len(marks)] = marks[: len(logits)] > 0
        if not allowed.any():
            raise EngineError("No token of the model can go on with the JSON that was asked for.")
        return logits.masked_fill(~allowed.to(logits.device), float("-inf"))

    def add(self, token: int) -> bool:
        """True where the answer is whole with `token`. Raises EngineError."""
        self._matcher.consume_token(token)
        self._check()
        return bool(self._matcher.is_stopped())

    def _check(self) -> None:
        if self._matcher.is_error():
            raise EngineError(
                f"The JSON can't be written: {first_line(self._matcher.get_error())}."
            )


def form_of(
    schema: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    vocabulary: int,
    ends: Iterable[int],
) -> JsonForm:
    """The form of an answer by `schema`. Raises ApiError.

    The first call for a tokenizer takes seconds.
    """
    if LLMatcher is None:
        raise bad_request(
            "This server writes no JSON by schema: it lacks llguidance (pip install "
            "'phatgoose[json]'). Leave response_format out, and ask for JSON in the prompt.",
            FIELD,
        )
    with _making:
        if tokenizer not in _known:
            try:
                made = from_tokenizer(tokenizer, max(vocabulary, len(tokenizer)), sorted(ends))
            except Exception as error:  # of a tokenizer written in Python, or an odd one
                message = f"This base's tokenizer can't be held to JSON: {first_line(error)}."
                raise ApiError(400, message, param=FIELD) from error
            _known[tokenizer] = made
    matcher = LLMatcher(
        _known[tokenizer], LLMatcher.grammar_from_json_schema(schema, overrides=WRITTEN)
    )
    if matcher.is_error():
        raise bad_request(f"The schema can't be used: {first_line(matcher.get_error())}.", FIELD)
    form = JsonForm(matcher)
    try:
        form.copy().allowed(torch.zeros(vocabulary))
    except EngineError as error:  # {"$ref": "#"}
        message = "The schema can't be used: no answer can begin by it, as where it is only itself."
        raise bad_request(message, FIELD) from error
    return form
