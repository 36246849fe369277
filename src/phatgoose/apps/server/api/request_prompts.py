"""From requests to prompts: the tokens that a model is given, checked against what it can hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from ....config import Serving
from ..api_errors import bad_request, for_clients
from ..engine.decoding import Decoding, seed_of
from ..engine.model_runner import ModelRunner
from .request_schema import ChatRequest, CompletionRequest

__all__ = ["RequestPrompt", "chat_prompt", "completion_prompts", "decoding_of"]

TOO_LONG = "context_length_exceeded"
CHARACTERS = 16  # more of them a token than any text has that a model would be asked about
DEFAULT_LENGTH = 16  # of a completion, as OpenAI has it


@dataclass(frozen=True)
class RequestPrompt:
    """Tokens to begin with, and the text that stands for them where a prompt is echoed."""

    tokens: tuple[int, ...]
    text: str


def completion_prompts(
    request: CompletionRequest, runner: ModelRunner, limits: Serving
) -> list[RequestPrompt]:
    """The prompts of a request.

    Raises ApiError for tokens that the model doesn't know, and more than it or the server can hold.
    """
    given, most = request.prompt, limits.max_choices
    texts: Sequence[str | Sequence[int]]
    if isinstance(given, str) or (given and isinstance(given[0], int)):
        texts = [given]
    else:
        texts = cast("list[str] | list[list[int]]", given)
    if len(texts) * (request.n or 1) > most:
        raise bad_request(
            f"{len(texts)} prompts and n = {request.n or 1} are {len(texts) * (request.n or 1)} "
            f"answers; one request may have {most}.",
            "n",
        )
    for text in texts:
        _check_length(text, "prompt", runner, limits)
    return [_prompt(text, runner) for text in texts]


def _check_length(
    given: str | Sequence[int], field: str, runner: ModelRunner, limits: Serving
) -> None:
    """Raise ApiError for what can't fit, before time is spent on turning it into tokens."""
    most = _most_tokens(runner, limits)
    if len(given) > most * (CHARACTERS if isinstance(given, str) else 1):
        kind = "characters" if isinstance(given, str) else "tokens"
        raise bad_request(
            f"The prompt has {len(given)} {kind}; the model can hold {most} tokens.",
            field,
            TOO_LONG,
        )


def _most_tokens(runner: ModelRunner, limits: Serving) -> int:
    """Tokens of prompt and answer together that the model and the server can hold."""
    context = None if runner.is_encoder_decoder else runner.context
    return min(limits.max_batch_tokens, context or limits.max_batch_tokens)


def _prompt(given: str | Sequence[int], runner: ModelRunner) -> RequestPrompt:
    tokenizer = runner.tokenizer
    if isinstance(given, str):
        before, after = runner.added
        text = tokenizer(given, add_special_tokens=False)["input_ids"]
        tokens: list[int] = [*before, *text, *after]
        return RequestPrompt(tuple(tokens or [_first(tokenizer)]), given)
    unknown = [token for token in given if token >= runner.vocabulary]
    if unknown:
        raise bad_request(
            f"Token {unknown[0]} is unknown; the model has {runner.vocabulary}.", "prompt"
        )
    return RequestPrompt(tuple(given), tokenizer.decode(list(given), skip_special_tokens=True))


def _first(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that an empty prompt begins with."""
    bos = tokenizer.bos_token_id
    return int(tokenizer.eos_token_id if bos is None else bos)


def chat_prompt(request: ChatRequest, runner: ModelRunner, limits: Serving) -> RequestPrompt:
    """The conversation as the base's chat template writes it.

    Raises ApiError when there is none, or it refuses the conversation, or that is too long.
    """
    tokenizer = runner.tokenizer
    if not tokenizer.chat_template:
        raise bad_request(
            "The base model has no chat template; use /v1/completions.", "model", "no_chat_template"
        )
    most = limits.max_choices
    if (request.n or 1) > most:
        raise bad_request(f"n is {request.n}; one request may have {most} answers.", "n")
    said = "".join(message.text for message in request.messages)
    _check_length(said, "messages", runner, limits)
    messages = [
        {"role": message.role, "content": message.text}
        | ({"name": message.name} if message.name else {})
        for message in request.messages
    ]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        raise bad_request(
            f"The base's chat template refuses the messages: {for_clients(error)}", "messages"
        ) from error
    _check_length(text, "messages", runner, limits)
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    return RequestPrompt(tuple(tokens), str(text))


def decoding_of(
    request: CompletionRequest | ChatRequest,
    prompt: RequestPrompt,
    runner: ModelRunner,
    limits: Serving,
    number: int,
) -> Decoding:
    """How the `number`-th answer of `request` is generated, after `prompt`.

    Raises ApiError for what the model or the server can't do.
    """
    if isinstance(request, ChatRequest):
        asked = request.max_completion_tokens or request.max_tokens
        logprobs = (request.top_logprobs or 0) if request.logprobs else None
        if request.top_logprobs and not request.logprobs:
            raise bad_request("top_logprobs needs logprobs to be true.", "top_logprobs")
    else:
        asked = DEFAULT_LENGTH if request.max_tokens is None else request.max_tokens
        logprobs = request.logprobs
        if request.echo and runner.is_encoder_decoder:
            raise bad_request("An encoder-decoder model doesn't echo its prompt.", "echo")
    stop = request.stop or []
    return Decoding(
        max_tokens=_length(asked, prompt, runner, limits),
        temperature=1.0 if request.temperature is None else request.temperature,
        top_p=1.0 if request.top_p is None else request.top_p,
        seed=seed_of(request.seed, number),
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        logprobs=logprobs,
        echo=isinstance(request, CompletionRequest) and bool(request.echo),
        routing=bool(request.routing),
        ignores_end=bool(request.ignore_eos),
    )


def _length(asked: int | None, prompt: RequestPrompt, runner: ModelRunner, limits: Serving) -> int:
    """The tokens to generate: those asked for, or as many as there is room for."""
    if asked is not None and asked > limits.max_tokens:
        raise bad_request(
            f"max_tokens is {asked}; this server generates {limits.max_tokens} at most.",
            "max_tokens",
        )
    _check_positions(asked or 0, prompt, runner)
    given, most = len(prompt.tokens), _most_tokens(runner, limits)
    room, wanted = most - given, 1 if asked is None else asked
    if room < wanted:
        raise bad_request(
            f"The prompt has {given} tokens and the answer {wanted}; the model can hold {most} "
            f"together.",
            "max_tokens" if asked else "messages",
            TOO_LONG,
        )
    if runner.is_encoder_decoder and runner.positions.answer is not None:
        room = min(room, runner.positions.answer)
    return min(room, limits.max_tokens) if asked is None else asked


def _check_positions(asked: int, prompt: RequestPrompt, runner: ModelRunner) -> None:
    """Raise ApiError for more than the places of an encoder or a decoder, which have their own."""
    if not runner.is_encoder_decoder:
        return
    given, places = len(prompt.tokens), runner.positions
    if places.prompt is not None and given > places.prompt:
        raise bad_request(
            f"The prompt has {given} tokens; the model's encoder can hold {places.prompt}.",
            "prompt",
            TOO_LONG,
        )
    if places.answer is not None and asked > places.answer:
        raise bad_request(
            f"max_tokens is {asked}; the model's decoder can hold {places.answer}.",
            "max_tokens",
            TOO_LONG,
        )
