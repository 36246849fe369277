"""Blocks: the layers that a prompt passes one after the other, and what comes out of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import RoutingError
from .sites import Stream
from .token_masks import token_masks


def prompt_stack(model: PreTrainedModel) -> nn.Module:
    """The part of `model` that reads prompts: an encoder, or a causal model without its head."""
    stack: nn.Module = model.get_encoder() if model.config.is_encoder_decoder else model.base_model
    return stack


def headless(model: PreTrainedModel) -> nn.Module:
    """`model` for passes whose logits nobody wants: a causal model without its head.

    The logits of a whole vocabulary for each token are most of the work of a small model.
    """
    whole: nn.Module = model if model.config.is_encoder_decoder else model.base_model
    return whole


def blocks_of(model: PreTrainedModel) -> list[nn.Module]:
    """The blocks of the stack that reads prompts: a causal model's layers, or an encoder's.

    Of several lists of modules in the stack, that with most modules inside. Raises RoutingError
    when there is none.
    """
    lists = [each for each in prompt_stack(model).modules() if isinstance(each, nn.ModuleList)]
    if not lists:
        raise RoutingError(f"{type(model).__name__} has no list of blocks to read.")
    largest = max(lists, key=lambda each: len(list(each.modules())))
    return list(largest)


@contextmanager
def watch_blocks(
    model: PreTrainedModel, indices: Sequence[int], see: Callable[[int, Tensor], None]
) -> Iterator[None]:
    """Call `see(index, hidden)` for each pass through each of these blocks in this context.

    `hidden` [rows, tokens, n] is what the block puts out: the residual stream, before any norm at
    the stack's end. Index -1 is what enters the first block. Passes of other threads are not seen.
    Raises RoutingError when there is no block of an index, and as `TokenMasks.grid` does.
    """
    blocks = blocks_of(model) if indices else []
    stream: Stream = "encoder" if model.config.is_encoder_decoder else "decoder"
    for index in indices:
        if not -1 <= index < len(blocks):
            raise RoutingError(f"There is no block {index}; there are 0 to {len(blocks) - 1}.")
    with token_masks(model) as masks:

        def watcher(index: int) -> Callable[..., None]:
            def hook(_: nn.Module, __: object, output: Tensor | tuple[Tensor, ...]) -> None:
                if masks.are_ours:
                    hidden = output if isinstance(output, Tensor) else output[0]
                    masks.grid(hidden, stream)  # refuses a model that pads inside
                    see(index, hidden)

            return hook

        def enter(_: nn.Module, args: tuple[Tensor, ...], given: Mapping[str, Tensor]) -> None:
            if masks.are_ours:
                see(-1, args[0] if args else given["hidden_states"])

        handles = [
            blocks[0].register_forward_pre_hook(enter, with_kwargs=True)
            if index == -1
            else blocks[index].register_forward_hook(watcher(index))
            for index in indices
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
