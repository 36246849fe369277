"""Answers in JSON: tokens that would break the form or a schema are left out, by llguidance.

Its matcher gives the tokens that may come next, and has limits of its own on the size of a schema
and the work of a step: a schema is a client's. It never raises, but says that it is in error.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ....errors import EngineError
from ....files import first_line
from ..protocol import bad_request
from .runner import ModelRunner

try:
    from llguidance import LLMatcher
    from llguidance.hf import from_tokenizer
except ImportError:
    LLMatcher = from_tokenizer = None

# As Python's json writes it: a small model that may write spaces writes nothing else.
WRITTEN = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}

_known: weakref.WeakKeyDictionary[PreTrainedTokenizerBase, Any] = weakref.WeakKeyDictionary()
_reading = threading.Lock()


class JsonForm:
    """What may follow in one answer; `copy` begins another of the same form."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def copy(self) -> JsonForm:
        return JsonForm(self._matcher.deep_copy())

    def allowed(self, logits: Tensor) -> Tensor:
        """`logits` [V], minus infinity for tokens that can't follow. Raises EngineError."""
        self._check()
        marks = torch.frombuffer(bytearray(self._matcher.compute_logit_bias()), dtype=torch.uint8)
        self._check()
        allowed = torch.zeros(len(logits), dtype=torch.bool)
        allowed[: len(marks)] = marks[: len(logits)] > 0
        return logits.masked_fill(~allowed.to(logits.device), float("-inf"))

    def add(self, token: int) -> bool:
        """True where the answer is whole with `token`. Raises EngineError."""
        self._matcher.consume_token(token)
        self._check()
        return bool(self._matcher.is_stopped())

    def _check(self) -> None:
        if self._matcher.is_error():
            said = first_line(self._matcher.get_error())
            raise EngineError(f"The JSON can't be written: {said}.")


def form_of(schema: Any, runner: ModelRunner) -> JsonForm:
    """The form of a model's answer by `schema`. Raises ApiError.

    The first call for a tokenizer takes seconds.
    """
    why = "this server lacks llguidance (pip install 'phatgoose[json]')"
    tokenizer = runner.tokenizer
    try:
        if LLMatcher is not None:
            with _reading:
                if tokenizer not in _known:
                    size = max(runner.vocabulary, len(tokenizer))
                    _known[tokenizer] = from_tokenizer(tokenizer, size, sorted(runner.ends))
            grammar = LLMatcher.grammar_from_json_schema(schema, overrides=WRITTEN)
            form = JsonForm(LLMatcher(_known[tokenizer], grammar))
            if form.copy().allowed(torch.zeros(runner.vocabulary)).isfinite().any():
                return form
            why = "no answer can begin by it, as where it is only itself"  # {"$ref": "#"}
    except Exception as error:  # also of a tokenizer that is written in Python, or an odd one
        why = first_line(error).rstrip(".")
    raise bad_request(f"Answers can't keep to this form: {why}.", "response_format")
