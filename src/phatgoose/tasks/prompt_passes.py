"""What a model makes of prompts: in passes, alone or with their targets, and as answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import (
    DynamicCache,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..files import one_line
from ..passes import acting_at, cache_argument, in_context, takes_argument, watching
from ..sites import Site, headless, prompt_stack
from .batching import Collator, batches_of_tokens, contiguous_head, decoder_start, pad_right
from .encoding import TokenPair

BATCH_TOKENS = 1024  # of a pass, padding included: little padding, few passes
PAIR_TOKENS = 4096  # the same with targets


def mean_token(activations: Tensor, mask: Tensor) -> Tensor:
    """The activations' [texts, columns, n] mean over each text's tokens, float32 [texts, n]."""
    shares = (mask / mask.sum(dim=1, keepdim=True)).float().to(activations.device)
    return torch.einsum("tc,tcn->tn", shares, activations.float())


@dataclass(frozen=True)
class PromptReading:
    """What is taken of a prompt: `of(activations, mask)` [texts, n] at each of `places`.

    Places are those of `passes.watching`, in the stack that reads prompts. `activations` [texts,
    columns, n] are of tokens where `mask` [texts, columns] is 1; padding is right.
    """

    places: Sequence[Site | int]
    of: Callable[[Tensor, Tensor], Tensor] = mean_token


Keep = Callable[[Sequence[Sequence[int]], Any, Tensor], None]  # prompts, their cache and mask
_KEEP: ContextVar[Keep | None] = ContextVar("keeps what was read", default=None)


def keeping_caches(keep: Keep) -> AbstractContextManager[None]:
    """Hand the keys and values of every batch that `read_prompts` reads in this context to `keep`.

    Only of causal models whose passes fill a cache.
    """
    return in_context(_KEEP, keep)


@torch.no_grad()
def read_prompts(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    reading: PromptReading,
    label: str | None = None,
    then: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """What `reading` takes of each of the `prompts`, given by their tokens, [prompts, places, n].

    `then` is applied to that, batch by batch. With a `label` there is a progress bar.
    """
    stack, device = prompt_stack(model), model.device
    options: dict[str, Any] = {} if model.config.is_encoder_decoder else {"use_cache": False}
    keep, cache_name = _KEEP.get(), cache_argument(stack)
    if model.config.is_encoder_decoder or not takes_argument(stack, cache_name):
        keep = None
    order, parts = list[int](), list[Tensor]()
    seen: dict[Site | int, Tensor] = {}

    def see(place: Site | int, values: Tensor, _: Tensor | None) -> None:
        seen[place] = reading.of(values, mask).cpu()

    with _bar(len(prompts), label, "readings") as bar, watching(model, reading.places, see):
        for rows in batches_of_tokens([len(prompt) for prompt in prompts], BATCH_TOKENS):
            ids = pad_right([prompts[row] for row in rows], 0)
            mask = pad_right([[1] * len(prompts[row]) for row in rows], 0).to(device)
            if keep is not None:
                options = {"use_cache": True, cache_name: DynamicCache()}
            stack(input_ids=ids.to(device), attention_mask=mask, **options)
            if keep is not None:
                keep([prompts[row] for row in rows], options[cache_name], mask)
            order += rows
            values = torch.stack([seen[place] for place in reading.places], dim=1)
            parts.append(then(values) if then else values)
            bar.update(len(rows))
    read = torch.cat(parts)
    # Batches came by length; rows go back to the order of the prompts.
    return torch.empty_like(read).index_copy_(0, torch.tensor(order), read)


@torch.no_grad()
def read_pairs(
    model: PreTrainedModel,
    sites: Iterable[Site],
    pairs: Sequence[TokenPair],
    collator: Collator,
    see: Callable[[Site, Tensor], None],
    label: str | None = None,
) -> None:
    """Call `see(site, u)` with the inputs u [tokens, n] of `sites` for all real tokens of `pairs`.

    Prompt and target pass in one go (teacher forcing). With a `label` there is a progress bar. With
    a `collator` for an expert that acts on prompts' ends, only tokens that it acts on are seen.
    """
    device, inner = model.device, headless(model)
    model.eval()
    active: Tensor | None = None

    def see_real(site: Site, u: Tensor, real: Tensor | None) -> None:
        real = real if active is None else active  # which are real
        see(site, u.flatten(0, -2) if real is None else u[real])

    with _bar(len(pairs), label, "means") as bar, watching(model, sites, see_real):
        for rows in batches_of_tokens([pair.length for pair in pairs], PAIR_TOKENS):
            inputs = collator([pairs[row] for row in rows])
            # With labels the model would compute a loss.
            inputs = {key: value.to(device) for key, value in inputs.items() if key != "labels"}
            active = inputs.pop("active", None)
            with acting_at(active):
                inner(**inputs, use_cache=False)
            bar.update(len(rows))


def _bar(prompts: int, label: str | None, what: str) -> tqdm:
    hidden = True if label is None else None  # None: shown in a terminal only
    return tqdm(total=prompts, desc=f"{one_line(label)}: {what}", unit="prompt", disable=hidden)


def continued(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: Tensor,
    mask: Tensor,
    max_new_tokens: int,
) -> Tensor:
    """The prompts `ids` [rows, columns], and the likeliest tokens after them.

    `mask` is 0 at padding. Of the model's generation_config only the tokens that begin and end
    answers count.
    """
    usual = model.generation_config
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        bos_token_id=usual.bos_token_id,
        eos_token_id=end_tokens(model, tokenizer) or None,
        pad_token_id=tokenizer.pad_token_id,
    )
    if model.config.is_encoder_decoder:
        config.decoder_start_token_id = decoder_start(model)
    # It would fill the open fields, and may penalise repetitions, suppress tokens or stop at texts.
    model.generation_config = GenerationConfig()
    try:
        with contiguous_head(model):
            output: Tensor = model.generate(ids, attention_mask=mask, generation_config=config)
    finally:
        model.generation_config = usual
    return output


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end an answer: the model's, else the tokenizer's; [] if neither names any."""
    named = model.generation_config.eos_token_id
    named = tokenizer.eos_token_id if named is None else named
    return list(named) if isinstance(named, list | tuple) else [] if named is None else [named]
