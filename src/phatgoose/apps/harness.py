"""Routed models under lm-evaluation-harness: `lm_eval --model phatgoose`.

    lm_eval --model phatgoose --model_args pool=experts,router=phatgoose,k=2 --tasks my_task

lm_eval finds `PhatgooseLM` by our entry point in its group "lm_eval.models". Its releases up to
0.4.13 don't read that group; `main` is the same command for them, and knows the model.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import torch
from transformers import PreTrainedModel

from ..base import load_base, settled_dtype
from ..config import POOL_SETTINGS, ROUTING_SETTINGS, Formatting, Routing, from_mapping
from ..errors import ConfigError, PoolError
from ..experts.pool import Pool
from ..routing.composition import composition_of
from ..routing.open_model import is_pool, is_routed, open_model
from ..routing.routers.auto import BY_TOKEN, first_allowed
from ..tasks.batching import pad_left, pad_right
from ..tasks.encoding import Encoder, added_tokens, cut_tokens

try:
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.registry import model_registry, register_model
    from lm_eval.models.huggingface import HFLM
    from lm_eval.utils import simple_parse_args_string
except ImportError as error:
    raise ConfigError("The harness needs lm-eval: pip install 'phatgoose[harness]'.") from error


MODEL = "phatgoose"
WHERE = "model_args"
DELIMITER = " "  # the harness puts it before a choice unless the task has its own
FIXED = POOL_SETTINGS | {"keep", "leave_out", "scores"}  # of a saved model
NAMES = ("pool", "base", "keep", "leave_out")

Request = tuple[Any, list[int], list[int]]  # (context, continuation) or None, and their tokens


@dataclass(frozen=True)
class ModelArguments(Routing):
    """The arguments in `--model_args`: a routing, and where and how the model is opened.

    A router's settings are joined by '+': router=phatgoose:eps=0.1+temperature=0.5.
    lm_eval's flags --batch_size, --max_batch_size and --device are merged into them.
    """

    pool: Annotated[str, "Folder of experts, manifest, or folder of a saved routed model."] = ""
    keep: Annotated[str | None, "Use these experts only: names joined by '+'."] = None
    leave_out: Annotated[str | None, "Use all experts but these: names joined by '+'."] = None
    scores: Annotated[str | None, "comparison.json of a compare, for best-individual."] = None
    base: Annotated[str | None, "The base model, where it is not under its recorded name."] = None
    dtype: Annotated[str, "auto, bfloat16, float16 or float32."] = "auto"
    device: Annotated[str | None, "Where to compute; a GPU that is not there is left out."] = None
    batch_size: Annotated[int | str, "Rows at a time, or auto."] = 1
    max_batch_size: Annotated[int, "The most rows that auto tries."] = 64
    add_eos: Annotated[bool, "Let every continuation end with end-of-sequence."] = False
    max_input_tokens: Annotated[
        int | None, "Longer contexts are cut to this many tokens; default: the model's maximum."
    ] = None
    truncation: Annotated[str, "What such a cut takes away: middle, left or right."] = "middle"

    def __post_init__(self) -> None:
        super().__post_init__()
        most = 1 if self.max_input_tokens is None else self.max_input_tokens
        Formatting(max_input_tokens=most, truncation=self.truncation)  # refuses what can't be
        if not self.pool:
            raise ConfigError("pool is missing; say pool=FOLDER.")

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> ModelArguments:
        """The arguments in `values`, as lm_eval parsed them, or ConfigError."""
        digits = {key: str(values[key]) for key in NAMES if type(values.get(key)) is int}
        router = {"router": str(values["router"]).replace("+", ",")} if "router" in values else {}
        arguments = from_mapping(cls, {**values, **digits, **router}, WHERE)
        given = sorted(FIXED & values.keys())
        if given and is_routed(arguments.pool):
            raise ConfigError(
                f"{WHERE}: {arguments.pool} is a saved routed model, made with its own "
                f"{', '.join(given)}; leave that out, or name the pool it was made of."
            )
        return arguments

    @property
    def routing(self) -> Routing:
        return Routing(**{name: getattr(self, name) for name in ROUTING_SETTINGS})


class PhatgooseLM(HFLM):  # type: ignore[misc]
    """A routed model as the harness's language model, opened by `ModelArguments`.

    Context and continuation are tokenised and cut as in `phatgoose.evaluate`. Without
    `max_input_tokens` contexts are cut to the model's positions only, because few-shot contexts are
    long. Log-likelihoods are float32; with `add_eos` those of `phatgoose.evaluate`, summed.
    """

    def __init__(self, **arguments: Any) -> None:
        self.arguments = ModelArguments.of(arguments)
        model = _open_routed(self.arguments)
        parts = composition_of(model)
        if any(parts.acting):
            raise ConfigError(
                "Some experts act from a prompt's end on, and lm_eval doesn't hand over where that "
                "is; score the model with 'phatgoose evaluate', or leave such experts out."
            )
        if parts.context is not None:
            raise ConfigError(
                f"Router {parts.routing.name} needs whole examples, which lm_eval hands over in "
                f"pieces; score it with 'phatgoose evaluate', or use another router."
            )
        super().__init__(
            pretrained=model,
            tokenizer=parts.tokenizer,
            backend="seq2seq" if model.config.is_encoder_decoder else "causal",
            batch_size=self.arguments.batch_size,
            max_batch_size=self.arguments.max_batch_size,
            softmax_dtype="float32",
            trust_remote_code=False,
        )
        seq2seq = self.backend == "seq2seq"
        self._encoder = Encoder(self.tokenizer, is_encoder_decoder=seq2seq)
        self._before, self._after = added_tokens(self.tokenizer, is_encoder_decoder=True)

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: Mapping[str, Any], additional_config: Mapping[str, Any] | None = None
    ) -> PhatgooseLM:
        flags = {k: v for k, v in (additional_config or {}).items() if v is not None}
        return cls(**{**flags, **arg_dict})

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: Mapping[str, Any] | None = None
    ) -> PhatgooseLM:
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    def get_model_info(self) -> dict[str, Any]:
        parts = composition_of(self.model)
        ours = {"base": asdict(parts.base), "routing": asdict(parts.routing)}
        return {**super().get_model_info(), MODEL: {**ours, "experts": parts.records}}

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        if self.backend == "seq2seq":
            target = self._encoder.continuation(context, continuation.removeprefix(DELIMITER))
            return self._context(context, self.max_length), target
        target = self._encoder.continuation(context, continuation)
        room = self.max_length + 1 - len(target) - self.arguments.add_eos  # the last is not read
        return self._context(self._encoder.prompt_text(context), room), target

    def _context(self, text: str, room: int) -> list[int]:
        tokens: list[int] = self.tok_encode(text)
        before = self._before if tokens[: len(self._before)] == self._before else []
        end = len(tokens) - len(self._after)
        after = self._after if self._after and tokens[end:] == self._after else []
        body = tokens[len(before) : len(tokens) - len(after)]
        after = after if self.backend == "seq2seq" else []  # an answer goes on from there
        most = min(room, self.arguments.max_input_tokens or room)
        left = cut_tokens(body, max(most - len(before) - len(after), 1), self.arguments.truncation)
        if len(left) < len(body):
            warnings.warn(
                f"Contexts that are too long are cut (truncation {self.arguments.truncation}).",
                stacklevel=2,
            )
        return [*before, *left, *after]

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        room = left_truncate_len or self.max_length
        rows = [self._context(self._encoder.prompt_text(text), room) for text in strings]
        pad = pad_left if padding_side == "left" else pad_right
        return pad(rows, self.tokenizer.pad_token_id), pad([[1] * len(row) for row in rows], 0)

    def _loglikelihood_tokens(self, requests: Sequence[Request], **options: Any) -> Any:
        if self.arguments.add_eos:
            eos = self.eot_token_id
            requests = [
                (texts, context, [*target, eos] if texts is not None else target)
                for texts, context, target in requests
            ]
        return super()._loglikelihood_tokens(requests, **options)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run lm_eval's own command, with `--model phatgoose` known to it."""
    before = sys.argv
    sys.argv = ["lm_eval", *(before[1:] if arguments is None else arguments)]
    try:
        cli_evaluate()
    finally:
        sys.argv = before


def _open_routed(arguments: ModelArguments) -> PreTrainedModel:
    device = arguments.device
    if device is not None and device.startswith("cuda") and not torch.cuda.is_available():
        device = None  # lm_eval's default is cuda:0, also on a machine without a GPU
    dtype = settled_dtype(arguments.dtype, device)
    base = load_base(arguments.base, dtype=dtype, device=device) if arguments.base else None
    if not (is_routed(arguments.pool) or is_pool(arguments.pool)):
        raise PoolError(f"{WHERE}: {arguments.pool} is neither a pool nor a routed model.")
    routing, keep = arguments.routing, _names(arguments.keep)
    left = _names(arguments.leave_out)
    if is_pool(arguments.pool):  # contexts come in pieces, so that auto can't go by prompts
        routing = first_allowed(routing, Pool.open(arguments.pool).select(keep, left), BY_TOKEN)
    model = open_model(
        arguments.pool,
        base,
        dtype=dtype,
        routing=routing,
        keep=keep,
        leave_out=left,
        scores=arguments.scores,
    ).model
    return model.to(device) if device else model


def _names(joined: str | None) -> list[str] | None:
    return None if joined is None else joined.split("+")


if MODEL not in model_registry:  # run as a command, this file is imported under a second name
    register_model(MODEL)(PhatgooseLM)

if __name__ == "__main__":
    main()
