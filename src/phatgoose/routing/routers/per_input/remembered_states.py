"""What the base makes of prompts, kept for other routers that read the same of that base."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["RememberedStates"]

MOST_BYTES = 2**30  # some 7,000 prompts of a base of 30 blocks of 576 numbers

Prompt = tuple[int, ...]  # its tokens


class RememberedStates:
    """States by prompt, as `experts.readings.PromptStates` has them, up to `most_bytes` of them.

    Prompts that came when there was no more room are read again each time.
    """

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self._left = most_bytes
        self._states: dict[Prompt, Tensor] = {}

    def of(
        self, prompts: Sequence[Sequence[int]], read: Callable[[Sequence[Prompt]], Tensor]
    ) -> Tensor:
        """The states [prompts, ..] of prompts given by their tokens.

        `read` finds those of the ones that aren't known, each once.
        """
        asked = [tuple(prompt) for prompt in prompts]
        new = [prompt for prompt in dict.fromkeys(asked) if prompt not in self._states]
        found = dict(zip(new, read(new), strict=True)) if new else {}
        for prompt, states in found.items():
            if states.nbytes <= self._left:
                self._left -= states.nbytes
                self._states[prompt] = states.clone()  # not a view, which would keep all
        known = self._states
        return torch.stack([known[each] if each in known else found[each] for each in asked])
