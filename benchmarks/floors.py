"""Arithmetic floors: multiply-adds counted from shapes, one token at a time.

Glossary: n inputs, d outputs, E experts, k chosen per token, r rank.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from phatgoose.sites import Site, find_sites

__all__ = ["Work"]

FORWARD, BACKWARD = 1, 1  # a frozen linear layer's backward pass has its input's gradient alone


@dataclass(frozen=True)
class Work:
    """Multiply-adds of a model's linear layers for one token.

    `sites` are those of the base's layers where experts act, `head` those of the output layer,
    `lora` those of one expert of rank r, `inputs` is the sum of n over the sites: one gate product.
    Attention's products and everything elementwise are left out.
    """

    sites: int
    head: int
    lora: int
    inputs: int
    outputs: int

    @classmethod
    def of(cls, model: PreTrainedModel, rank: int) -> Work:
        """The work of `model`, which is not routed, with experts of `rank` at all sites."""
        head = model.get_output_embeddings()
        assert isinstance(head, nn.Linear)
        return cls.at(find_sites(model).values(), rank, head.weight.numel())

    @classmethod
    def at(cls, sites: Iterable[Site], rank: int, head: int = 0) -> Work:
        """The work at `sites`."""
        shapes = [(site.in_features, site.out_features) for site in sites]
        return cls(
            sites=sum(n * d for n, d in shapes),
            head=head,
            lora=sum(rank * (n + d) for n, d in shapes),
            inputs=sum(n for n, _ in shapes),
            outputs=sum(d for _, d in shapes),
        )

    def base(self, head_share: float = 0.0) -> float:
        """The base model's, with logits for `head_share` of the tokens."""
        return self.sites + head_share * self.head

    def routed(self, experts: int, k: int) -> float:
        """What routing adds: E gate products and k experts' updates."""
        return experts * self.inputs + k * self.lora

    def dense(self, experts: int) -> float:
        """What a loop over all experts adds: E gate products and E updates."""
        return experts * (self.inputs + self.lora)

    def arrow_of_peft(self, experts: int) -> float:
        """What PEFT's Arrow adds: a dense loop, and the scaled sum over E outputs."""
        return self.dense(experts) + 2 * experts * self.outputs

    def lora_step(self, head_share: float) -> float:
        """A training step's, for one token: base forth and back, LoRA forth and twice back."""
        both = FORWARD + BACKWARD
        return both * self.base(head_share) + (both + 1) * self.lora

    def gate_step(self, head_share: float) -> float:
        """The same when gates are trained: nothing of the LoRA has a gradient, each gate has."""
        both = FORWARD + BACKWARD
        return both * (self.base(head_share) + self.lora) + (both + 1) * self.inputs
