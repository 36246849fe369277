"""What a model makes of prompts: in passes, alone or with their targets, and as answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
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
from ..passes import ActsOn, acting_at, cache_argument, takes_argument, watch_blocks, watch_inputs
from ..sites import Site, headless, input_device, prompt_stack
from .batching import Collator, batches_of_tokens, contiguous_head, decoder_start, pad_right
from .encoding import TokenPair

BATCH_TOKENS = 1024  # of a pass, padding included: little padding, few passes
PAIR_TOKENS = 4096  # the same with targets


class PromptReading:
    """What is taken from a model's passes of prompts: one subclass for each use.

    It sees inputs of `sites` (of the stack that reads prompts, see `sites`) and outputs of
    `blocks`, by index; -1 is what enters the first.
    """

    sites: Mapping[str, Site] = {}
    blocks: Sequence[int] = ()

    def begin(self, mask: Tensor) -> None:
        """A batch comes whose tokens are where `mask` [texts, columns] is 1; padding is right."""

    def see_site(self, site: Site, u: Tensor) -> None:
        """The input u [texts, columns, n] of a site; the last columns of shorter texts are void."""

    def see_block(self, index: int, hidden: Tensor) -> None:
        """The output [texts, columns, n] of a block."""

    def found(self) -> Tensor:
        """What the batch gave, [texts, ..], on the CPU; equally large for all batches."""
        raise NotImplementedError


Keep = Callable[[Sequence[Sequence[int]], Any, Tensor], None]  # prompts, their cache and mask
_KEEP: ContextVar[Keep | None] = ContextVar("keeps what was read", default=None)


@contextmanager
def keeping_caches(keep: Keep) -> Iterator[None]:
    """Hand the keys and values of every batch that `read_prompts` reads in this context to `keep`.

    Only of causal models whose passes fill a cache.
    """
    before = _KEEP.set(keep)
    try:
        yield
    finally:
        _KEEP.reset(before)


@torch.no_grad()
def read_prompts(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    reading: PromptReading,
    label: str | None = None,
    then: Callable[[Tensor], Tensor] | None = None,
    budget: int = BATCH_TOKENS,
) -> Tensor:
    """What `reading` finds in each of the `prompts`, given by their tokens, [prompts, ..].

    A batch has `budget` tokens at most, and `then` is applied to what it gave. With a `label` there
    is a progress bar.
    """
    stack, device = prompt_stack(model), input_device(model)
    options: dict[str, Any] = {} if model.config.is_encoder_decoder else {"use_cache": False}
    keep, cache_name = _KEEP.get(), cache_argument(stack)
    if model.config.is_encoder_decoder or not takes_argument(stack, cache_name):
        keep = None
    order: list[int] = []
    parts: list[Tensor] = []

    def see_site(site: Site, u: Tensor, _: Tensor | None) -> None:
        # Sites inside one of the base's own experts see some of the tokens, without rows.
        if u.dim() > 2:
            reading.see_site(site, u)

    with (
        _bar(len(prompts), label, "readings") as bar,
        watch_inputs(model, reading.sites, see_site),
        watch_blocks(model, reading.blocks, reading.see_block),
    ):
        for rows in batches_of_tokens([len(prompt) for prompt in prompts], budget):
            ids = pad_right([prompts[row] for row in rows], 0)
            mask = pad_right([[1] * len(prompts[row]) for row in rows], 0).to(device)
            reading.begin(mask)
            if keep is not None:
                options = {"use_cache": True, cache_name: DynamicCache()}
            stack(input_ids=ids.to(device), attention_mask=mask, **options)
            if keep is not None:
                keep([prompts[row] for row in rows], options[cache_name], mask)
            order += rows
            parts.append(then(reading.found()) if then else reading.found())
            bar.update(len(rows))
    found = torch.cat(parts)
    # Batches came by length; rows go back to the order of the prompts.
    return torch.empty_like(found).index_copy_(0, torch.tensor(order), found)


@torch.no_grad()
def read_pairs(
    model: PreTrainedModel,
    sites: Mapping[str, Site],
    pairs: Sequence[TokenPair],
    pad_token_id: int,
    see: Callable[[Site, Tensor], None],
    label: str | None = None,
    acting: ActsOn | None = None,
) -> None:
    """Call `see(site, u)` with the inputs u [tokens, n] of `sites` for all real tokens of `pairs`.

    Prompt and target pass in one go (teacher forcing). With a `label` there is a progress bar. Of
    an expert that is `acting` on prompts' ends, only the tokens are seen that it acts on.
    """
    collator, device = Collator(model, pad_token_id, acting=acting), input_device(model)
    inner = headless(model)
    model.eval()
    active: Tensor | None = None

    def see_real(site: Site, u: Tensor, real: Tensor | None) -> None:
        real = real if active is None else active  # which are real
        see(site, u.flatten(0, -2) if real is None else u[real])

    with _bar(len(pairs), label, "means") as bar, watch_inputs(model, sites, see_real):
        for rows in batches_of_tokens([pair.length for pair in pairs], PAIR_TOKENS):
            inputs = collator([pairs[row] for row in rows])
            # With labels the model would compute a loss.
            inputs.pop("labels")
            inputs = {key: value.to(device) for key, value in inputs.items()}
            active = inputs.pop("active", None)
            with acting_at(active):
                inner(**inputs, use_cache=False)
            bar.update(len(rows))


def _bar(prompts: int, label: str | None, what: str) -> tqdm:
    hidden = True if label is None else None  # None: shown in a terminal only
    return tqdm(total=prompts, desc=f"{one_line(label)}: {what}", unit="prompt", disable=hidden)


def last_token(activations: Tensor, mask: Tensor) -> Tensor:
    """The activations [texts, columns, n] of each text's last token, [texts, n]."""
    last = mask.to(activations.device).sum(dim=1) - 1  # blocks may be on several devices
    return activations[torch.arange(len(last), device=last.device), last]


def mean_token(activations: Tensor, mask: Tensor) -> Tensor:
    """The activations' [texts, columns, n] mean over each text's tokens, float32 [texts, n]."""
    shares = (mask / mask.sum(dim=1, keepdim=True)).float().to(activations.device)
    return torch.einsum("tc,tcn->tn", shares, activations.float())


def continued(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: Tensor,
    mask: Tensor,
    max_new_tokens: int,
    temperature: float | None = None,
) -> Tensor:
    """What `model.generate` returns for the prompts `ids` [rows, columns]; `mask` is 0 at padding.

    `temperature` None is greedy, else tokens are drawn from the whole distribution. Of the model's
    generation_config only the tokens that begin and end answers count.
    """
    own = model.generation_config
    config = _WholeConfig(
        max_new_tokens=max_new_tokens,
        do_sample=temperature is not None,
        bos_token_id=own.bos_token_id,
        eos_token_id=end_tokens(model, tokenizer) or None,
        pad_token_id=tokenizer.pad_token_id,
    )
    if temperature is not None:
        # transformers would draw from the 50 likeliest tokens.
        config.temperature, config.top_k = temperature, 0
    if model.config.is_encoder_decoder:
        config.decoder_start_token_id = decoder_start(model)
    with contiguous_head(model):
        output: Tensor = model.generate(ids, attention_mask=mask, generation_config=config)
    return output


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end an answer: the model's, else the tokenizer's; [] if neither names any."""
    named = model.generation_config.eos_token_id
    named = tokenizer.eos_token_id if named is None else named
    return list(named) if isinstance(named, list | tuple) else [] if named is None else [named]


class _WholeConfig(GenerationConfig):  # type: ignore[misc]
    # `generate` fills the open fields of any other config from the model's generation_config, which
    # may penalise repetitions, suppress tokens or stop at texts: not the model's likeliest answers.
    def update(self, defaults_only: bool = False, **given: Any) -> dict[str, Any]:
        if defaults_only:
            usual = self._get_default_generation_params()
            usual.pop("max_length", None)  # it warns of one beside max_new_tokens
            given = {name: usual[name] for name in usual.keys() & given.keys()}
        unused: dict[str, Any] = super().update(defaults_only=defaults_only, **given)
        return unused
