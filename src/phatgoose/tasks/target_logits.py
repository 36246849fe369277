"""The logits of target tokens, and no more of them than needed."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

__all__ = ["contiguous_head", "head_at", "quick_backward", "target_logits"]

# Up to so many tokens in a row, keeping all attention probabilities takes no more memory than the
# rest of a backward pass (six bytes per token, head and column).
SHORT_ROW = 256


def target_logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The logits that predict `batch["labels"]`: its shape and the vocabulary's.

    `batch` comes from `Collator`. Causal models that can be packed compute no others, and those
    with `logits_to_keep` few.
    """
    inputs: dict[str, Any] = {
        key: value for key, value in batch.items() if key not in ("labels", "places")
    }
    inner = _unwrapped(model)
    if "places" in batch:
        columns = batch["input_ids"].shape[1]
        with head_at(inner, batch["places"]), quick_backward(inner, columns):
            return _logits(model, inputs)
    if "decoder_input_ids" in batch:
        return _logits(model, inputs)
    kept = batch["labels"].shape[1] + 1
    if "logits_to_keep" in inspect.signature(inner.forward).parameters:
        inputs["logits_to_keep"] = kept
    return _logits(model, inputs)[:, -kept:-1]


def _logits(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    logits: Tensor = model(**inputs, use_cache=False).logits
    return logits


def _unwrapped(model: nn.Module) -> Any:
    """The transformers model inside wrappers for several devices or PEFT's layers."""
    inner: Any = model.module if isinstance(model, DistributedDataParallel) else model
    return inner.get_base_model() if isinstance(inner, PeftModel) else inner


@contextmanager
def _head_input(model: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Apply `change` to the input of the output layer of `model` while the context is open."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    handle = head.register_forward_pre_hook(lambda _, args: (change(args[0]), *args[1:]))
    try:
        yield
    finally:
        handle.remove()


def contiguous_head(model: nn.Module) -> AbstractContextManager[None]:
    """Hand the output layer of `model` contiguous rows while the context is open.

    Logits asked for at the last positions only reach it as a strided view, for which torch copies
    the whole output matrix once per row: a quarter of a training step (SmolLM2, 8 x 128 tokens),
    half of reading one prompt of 24. A view of one row counts as contiguous, and is copied too.
    """
    return _head_input(model, lambda hidden: hidden.clone(memory_format=torch.contiguous_format))


def head_at(model: nn.Module, places: Tensor) -> AbstractContextManager[None]:
    """Compute logits at `places` only, [1, places, vocabulary], while the context is open.

    `places` count the tokens of a batch, row by row.
    """
    return _head_input(model, lambda hidden: hidden.flatten(0, 1)[places].unsqueeze(0))


@contextmanager
def quick_backward(model: PreTrainedModel, columns: int) -> Iterator[None]:
    """Use the attention with the faster backward pass while the context is open.

    On a CPU plain products take half the time of torch's fused kernel, but they keep every
    probability, so only where rows of `columns` tokens are short. `model` can be packed.
    """
    usual = model.config.get_text_config()._attn_implementation
    if model.device.type != "cpu" or columns > SHORT_ROW or usual == "eager":
        yield
        return
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(usual)
