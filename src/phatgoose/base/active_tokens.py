"""Which tokens an expert acts on: all, or those from its prompt's end on (Activated LoRA).

Such an expert (Greenewald et al. 2025, arXiv 2504.12397) adds nothing in a prompt's body, which is
then the base's own. It acts at the prompt's last tokens, or from its last invocation sequence on,
and at every token of the answer. So it acts from some position of a text on, its beginning there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import ExpertError, RoutingError
from ..files.strict import shortened

NEVER = torch.iinfo(torch.int64).max  # the beginning where an expert doesn't act at all
IN_ANSWER = NEVER - 1  # a position behind every beginning that there is
LONGEST = 1 << 24  # of tails and of tokens' numbers, so that a damaged record is found out


@dataclass(frozen=True)
class ActsOn:
    """The end of a prompt that an expert acts on: its last `tail` tokens, or `invocation`.

    `invocation` are tokens: the expert acts from where they last begin, and nowhere in a prompt
    without them or in its answer, as PEFT's aLoRA. One of the two is given.
    """

    tail: int = 0
    invocation: tuple[int, ...] = ()

    def beginning(self, prompt: Sequence[int]) -> int:
        """The position of the first token of `prompt` that is acted on, NEVER for none."""
        if not self.invocation:
            return max(len(prompt) - self.tail, 0)
        size, wanted = len(self.invocation), list(self.invocation)
        for at in range(len(prompt) - size, -1, -1):
            if list(prompt[at : at + size]) == wanted:
                return at
        return NEVER

    def record(self) -> dict[str, Any]:
        if self.invocation:
            return {"invocation_tokens": list(self.invocation)}
        return {"tail": self.tail}

    @classmethod
    def of(cls, record: object) -> ActsOn | None:
        """What `record` holds, None (for all tokens) for None. Raises ExpertError for others."""
        if record is None:
            return None
        held = record if isinstance(record, Mapping) and len(record) == 1 else {}
        tail, tokens = held.get("tail"), held.get("invocation_tokens")
        if type(tail) is int and 0 < tail <= LONGEST:
            return cls(tail=tail)
        if isinstance(tokens, list) and 0 < len(tokens) <= LONGEST and all(map(_is_token, tokens)):
            return cls(invocation=tuple(tokens))
        raise ExpertError(
            f"acts_on is {shortened(record)}; wanted a tail of at least 1 or invocation_tokens."
        )

    def __str__(self) -> str:
        if self.invocation:
            return f"from the tokens {shortened(list(self.invocation))} on"
        return f"the prompt's last {self.tail} token{'s' * (self.tail > 1)} and the answer"


def _is_token(value: object) -> bool:
    return type(value) is int and 0 <= value < LONGEST


def beginnings(acting: Sequence[ActsOn], prompts: Sequence[Sequence[int]]) -> Tensor:
    """Where each of `acting` begins in each of `prompts`, int64 [prompts, acting]."""
    found = [[each.beginning(prompt) for each in acting] for prompt in prompts]
    return torch.tensor(found, dtype=torch.int64).view(len(prompts), len(acting))


# One expert alone, in training and measurements: who makes a batch says where the expert acts.

_ACTIVE: ContextVar[Tensor | None] = ContextVar("active tokens", default=None)


@contextmanager
def acting_at(active: Tensor | None) -> Iterator[None]:
    """The expert acts at these tokens of the passes in this context, [rows, columns]; None: all."""
    before = _ACTIVE.set(active)
    try:
        yield
    finally:
        _ACTIVE.reset(before)


def active_share(u: Tensor) -> Tensor | None:
    """1 at tokens of u [.., n] that the expert acts on and 0 elsewhere, [.., 1]; None: at all.

    Raises RoutingError for a layer that sees other tokens than the batch's.
    """
    active = _ACTIVE.get()
    if active is None:
        return None
    if u[..., 0].numel() != active.numel():
        raise RoutingError(
            f"A layer sees {u[..., 0].numel()} of a batch's {active.numel()} tokens, as inside one "
            f"of the base's own experts; an expert there acts on all tokens only."
        )
    return active.to(u.device, u.dtype).reshape(*u.shape[:-1], 1)


def where_active(strength: Tensor | float, u: Tensor) -> Tensor | float:
    """`strength` at tokens of u [.., n] that the expert acts on, and 0 elsewhere.

    Raises what `active_share` does.
    """
    active = active_share(u)
    return strength if active is None else strength * active
