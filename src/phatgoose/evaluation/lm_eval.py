"""Routed models under lm-evaluation-harness: `lm_eval --model phatgoose`.

    lm_eval --model phatgoose --model_args pool=experts,router=phatgoose,k=2 --tasks my_task

lm_eval finds `PhatgooseLM` by our entry point in its group "lm_eval.models". Its releases up to
0.4.13 don't read that group; `main` is the same command for them, and knows the model.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from transformers import PreTrainedModel

from ..base.loading import settled_dtype
from ..config import POOL_SETTINGS, Formatting, Routing, from_mapping
from ..errors import ConfigError
from ..experts.pool import Pool
from ..routing.compose import composition_of
from ..routing.opening import is_pool, open_model, require_pool
from ..routing.routers.auto import BY_TOKEN, first_allowed
from ..tasks.batching import pad_left, pad_right, padded_rows
from ..tasks.encoding import Encoder, Tokens

try:
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.registry import model_registry, register_model
    from lm_eval.models.huggingface import HFLM
except ImportError as error:
    raise ConfigError("The harness needs lm-eval: pip install 'phatgoose[harness]'.") from error


MODEL = "phatgoose"
WHERE = "model_args"
DELIMITER = " "  # the harness puts it before a choice unless the task has its own

# (context, continuation) or None, and their tokens
Request = tuple[tuple[str, str] | None, Tokens, Tokens]


@dataclass(frozen=True)
class Opening:
    """Where and how the model is opened: what `--model_args` has beside a routing.

    `pool` is a folder of experts, or the folder of a saved routed model. A router's
    settings are joined by '+': router=phatgoose:eps=0.1+temperature=2. `add_eos` lets every
    continuation end with end-of-sequence. Contexts of more than `max_input_tokens` (None: the
    model's maximum) are cut by `truncation`. lm_eval's own flags --batch_size, --max_batch_size and
    --device are merged into these.
    """

    pool: str = ""
    base: str | None = None
    dtype: str = "auto"
    device: str | None = None
    batch_size: int | str = 1
    max_batch_size: int = 64
    add_eos: bool = False
    max_input_tokens: int | None = None
    truncation: Any = "middle"

    def model(self, routing: Routing) -> PreTrainedModel:
        """The routed model that is there."""
        device = self.device
        wants_gpu = device is not None and device.startswith("cuda")
        if wants_gpu and not torch.cuda.is_available():
            device = None  # lm_eval's default is cuda:0, also on a machine without a GPU
        dtype = settled_dtype(self.dtype, device)
        if is_pool(self.pool):  # contexts come in pieces, so that auto can't go by prompts
            routing = first_allowed(routing, Pool.open(self.pool), BY_TOKEN)
        model = open_model(self.pool, self.base, dtype=dtype, routing=routing).model
        return model.to(device) if device else model

    def formatting(self, positions: int) -> Formatting:
        """How contexts are cut where the model has so many positions."""
        most = positions if self.max_input_tokens is None else self.max_input_tokens
        return Formatting(max_input_tokens=most, truncation=self.truncation)


def arguments_of(values: Mapping[str, Any]) -> tuple[Opening, Routing]:
    """What `--model_args` holds, as lm_eval parsed it. Raises ConfigError."""
    names = {setting.name for setting in fields(Opening)}
    where = {}
    how = {}
    for name, value in values.items():
        if name not in names:
            how[name] = value
        elif value is not None:
            where[name] = value
    if "router" in how:
        how["router"] = str(how["router"]).replace("+", ",")
    opening = Opening(**where)
    routing = from_mapping(Routing, how, WHERE)
    opening.formatting(1)  # refuses what can't be
    if POOL_SETTINGS & values.keys():
        require_pool(opening.pool)
    return opening, routing


class PhatgooseLM(HFLM):  # type: ignore[misc]
    """A routed model as the harness's language model, opened by `Opening` and a routing.

    Context and continuation are tokenised and cut as in `phatgoose.evaluate`. Without
    `max_input_tokens` contexts are cut to the model's positions only, because few-shot contexts are
    long. Log-likelihoods are float32; with `add_eos` those of `phatgoose.evaluate`, summed.
    """

    def __init__(self, **arguments: Any) -> None:
        self.opening, routing = arguments_of(arguments)
        model = self.opening.model(routing)
        parts = composition_of(model)
        if any(parts.tails) or parts.context is not None:
            raise ConfigError(
                f"lm_eval hands examples over in pieces, but router {parts.routing.name} or some "
                f"experts need whole ones; score the model with 'phatgoose evaluate'."
            )
        super().__init__(
            pretrained=model,
            tokenizer=parts.tokenizer,
            backend="seq2seq" if model.config.is_encoder_decoder else "causal",
            batch_size=self.opening.batch_size,
            max_batch_size=self.opening.max_batch_size,
            softmax_dtype="float32",
            trust_remote_code=False,
        )
        formatting = self.opening.formatting(self.max_length)
        self._encoder = Encoder.for_model(model, self.tokenizer, formatting)

    def _encode_pair(self, context: str, continuation: str) -> tuple[Tokens, Tokens]:
        if self.backend == "seq2seq":
            continuation = continuation.removeprefix(DELIMITER)
        target = self._encoder.continuation(context, continuation)
        room = len(target) + self.opening.add_eos - 1  # the last token is not read
        return self._context(context, room), target

    def _context(self, text: str, followed_by: int) -> Tokens:
        fitted = self._encoder.fitted(text, followed_by=followed_by)
        if fitted.cut:
            warnings.warn(
                f"Contexts that are too long are cut (truncation {self.opening.truncation}).",
                stacklevel=2,
            )
        return fitted.tokens

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        answers = self.max_length - (left_truncate_len or self.max_length)
        rows = [self._context(text, answers) for text in strings]
        side = pad_left if padding_side == "left" else pad_right
        return padded_rows(side, rows, self.tokenizer.pad_token_id)

    def _loglikelihood_tokens(self, requests: Sequence[Request], **options: object) -> Any:
        ended = []
        for texts, context, target in requests:
            if self.opening.add_eos and texts is not None:
                target = [*target, self.eot_token_id]
            ended.append((texts, context, target))
        return super()._loglikelihood_tokens(ended, **options)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run lm_eval's own command, with `--model phatgoose` known to it."""
    before = sys.argv
    sys.argv = ["lm_eval", *(before[1:] if arguments is None else arguments)]
    try:
        cli_evaluate()
    finally:
        sys.argv = before


if MODEL not in model_registry:  # releases after 0.4.13 read our entry point
    register_model(MODEL)(PhatgooseLM)
