"""Reading a dataset with a routed model: prompt and right answer of every example, once each.

This way all routers read the same tokens, so their decisions can be compared token by token. (The
released code's distributions take the answer that the model chose.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..base.blocks import headless
from ..base.offloading import input_device
from ..base.sites import Stream
from ..files.quoting import one_line
from ..routing.composition import announcing
from ..routing.recording import watch
from ..routing.watching import SitePass
from ..tasks.collating import Collator, batches_of_tokens, pad_right
from ..tasks.encoding import Encoder, TokenPair
from ..tasks.task import Example

__all__ = ["Observer", "pass_through", "read_examples"]


class Observer:
    """Callback for the passes of a routed model; this base class ignores every event."""

    def begin_pass(self, parts: Mapping[Stream, Tensor]) -> None:
        """Called before a pass; `parts` [rows, tokens] by stream: 0 for prompt, 1 for answer."""

    def add(self, passed: SitePass) -> None:
        """Called at each site of a pass."""

    def end_pass(self) -> None:
        """Called after a pass."""


def read_examples(
    model: PreTrainedModel,
    encoder: Encoder,
    task: str,
    examples: Sequence[Example],
    observers: Sequence[Observer],
    budget: int,
) -> None:
    """Pass every example's prompt and target through the routed `model`, watched by `observers`.

    A batch holds at most `budget` tokens, padding included. The target's last token (the end of the
    sequence) is never read, as in scoring. Raises RoutingError when the model is not routed, or has
    router oracle and no score of `task`.
    """
    pairs = [encoder.pair(row.input, row.target, row.passage) for row in examples]
    with announcing(model, task, [pair.prompt for pair in pairs], examples) as before_pass:
        bar = tqdm(total=len(pairs), desc=f"routing of {one_line(task)}", disable=None, leave=False)
        for batch in batches_of_tokens([pair.length for pair in pairs], budget):
            before_pass(batch)
            pass_through(model, encoder, [pairs[index] for index in batch], observers)
            bar.update(len(batch))
        bar.close()


def pass_through(
    model: PreTrainedModel,
    encoder: Encoder,
    pairs: Sequence[TokenPair],
    observers: Sequence[Observer],
) -> None:
    """One pass of `pairs` through the routed `model`, in rows padded on the right."""
    inputs, parts = _inputs(model, encoder, pairs)
    for observer in observers:
        observer.begin_pass(parts)

    def notify(passed: SitePass) -> None:
        for observer in observers:
            observer.add(passed)

    with watch(model, notify), torch.inference_mode():
        device = input_device(model)
        headless(model)(**{name: rows.to(device) for name, rows in inputs.items()}, use_cache=False)
    for observer in observers:
        observer.end_pass()


def _inputs(
    model: PreTrainedModel, encoder: Encoder, pairs: Sequence[TokenPair]
) -> tuple[dict[str, Tensor], dict[Stream, Tensor]]:
    """(inputs, parts by stream): prompt and target in one row, or in encoder and decoder."""
    pad = encoder.tokenizer.pad_token_id
    if encoder.is_encoder_decoder:
        inputs = Collator(model, pad)(pairs)
        del inputs["labels"]
        prompts, targets = inputs["input_ids"], inputs["decoder_input_ids"]
        return inputs, {"encoder": torch.zeros_like(prompts), "decoder": torch.ones_like(targets)}
    rows = [pair.prompt + pair.target[:-1] for pair in pairs]
    parts = [[0] * len(pair.prompt) + [1] * (len(pair.target) - 1) for pair in pairs]
    mask = pad_right([[1] * len(row) for row in rows], 0)
    return {"input_ids": pad_right(rows, pad), "attention_mask": mask}, {
        "decoder": pad_right(parts, 0)
    }
