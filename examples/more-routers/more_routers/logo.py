"""LoGo: the experts whose updates of one layer are longest at the prompt's end.

Lee et al., ACL 2026 (arXiv 2511.07129), with its norm, not its entropy. At the query projection of
the last block, s_z = |scale_z B_z A_z h| for the last token's h; the k experts with the highest s
act on the whole input, Σ w B A u at every site with w_z = s_z / Σ s over those k. k is 20 as there.

As in the released code, h is the stream that enters the block, before the block's norm; the
projection itself, and a LoRA there, is given what comes out of that norm, which reads=site
reads. There h comes from a pass with experts at work, all at once for the first input and then
those that the input before had chosen; here from the base alone, so that an input's experts depend
on nothing but the input.

The last block is the last one where LoRAs act, the encoder's in encoder-decoder models. Where none
act at a query projection it is the block's first site that has some. Experts that don't act there
score 0.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from phatgoose.errors import RoutingError
from phatgoose.experts.lora import LoraStack
from phatgoose.routing.choice import Choice
from phatgoose.routing.layers import RoutedLinear, SiteStack
from phatgoose.routing.routers.prompt import ReadsBase, Tables
from phatgoose.routing.routers.router import highest
from phatgoose.sites import Site, blocks_of
from phatgoose.tasks.batching import PromptReading

QUERY = re.compile(r"(^|\.)(q|q_proj|q_lin|query|c_attn|query_key_value|qkv_proj|Wqkv)$")
SMALLEST = 1e-20  # of a sum of scores


@dataclass(frozen=True)
class Logo(ReadsBase):
    """Per prompt, the experts with the longest updates of one layer at the prompt's end."""

    name, label, needs, usual_k = "logo", "LoGo", ("lora",), 20

    reads: Annotated[
        Literal["block", "site"],
        "Which input is read: the layer's (site) or its block's (block).",
    ] = "block"

    def reading(self, base: PreTrainedModel, tables: Tables) -> PromptReading:
        probe = _probe(base)
        # What comes out of one block enters the next.
        place = probe.site if self.reads == "site" else probe.block - 1
        return PromptReading((place,), partial(_lengths, probe=probe, pool_size=len(tables.names)))

    def prompt_scores(self, features: Tensor, ready: Tables) -> Tensor:
        return features[:, 0]

    def choice(self, scores: Tensor) -> Choice:
        experts = highest(scores, min(self.k, scores.shape[1]))
        chosen = scores.gather(1, experts)
        return Choice(experts, chosen / chosen.sum(dim=1, keepdim=True).clamp(min=SMALLEST))


@dataclass(frozen=True)
class _Probe:
    """The site that is looked at, the experts there, and the index of its block."""

    site: Site
    stack: SiteStack
    block: int


def _probe(base: PreTrainedModel) -> _Probe:
    names, blocks = {module: name for name, module in base.named_modules()}, blocks_of(base)

    for index in reversed(range(len(blocks))):
        found = {
            names[module]: (module.site, module.stack)
            for module in blocks[index].modules()
            if isinstance(module, RoutedLinear) and _low_rank(module.stack)
        }
        if found:
            chosen = next((name for name in found if QUERY.search(name)), next(iter(found)))
            return _Probe(*found[chosen], index)
    raise RoutingError("Router logo reads a block that reads prompts, and no LoRA acts in one.")


def _low_rank(stack: SiteStack) -> dict[str, LoraStack]:
    """The parts with LoRA factors by name: LoRAs, and the LoRAs of DoRAs."""
    return {name: part for name, part in stack.parts.items() if isinstance(part, LoraStack)}


def last_token(activations: Tensor, mask: Tensor) -> Tensor:
    """The activations [texts, columns, n] of each text's last token, [texts, n]."""
    last = mask.to(activations.device).sum(dim=1) - 1  # blocks may be on several devices
    return activations[torch.arange(len(last), device=last.device), last]


def _lengths(activations: Tensor, mask: Tensor, probe: _Probe, pool_size: int) -> Tensor:
    """|scale B A h| of every expert for the last token of each text, [texts, E]."""
    if activations.shape[-1] != probe.site.in_features:
        raise RoutingError(
            f"Router logo reads {activations.shape[-1]} features before the block, but LoRAs act "
            f"on {probe.site.in_features} at {probe.site.name}; use logo:reads=site."
        )
    found, stack = torch.zeros(len(mask), pool_size), probe.stack
    for name, part in _low_rank(stack).items():
        h = last_token(activations, mask).to(part.A.device).float()
        inside = torch.einsum("tn,ern->ter", h, part.A.float())
        lengths = torch.einsum("ter,erd->ted", inside, part.B.float()).norm(dim=-1)
        experts = stack.experts[stack.rows()[name]].cpu()
        found[:, experts] = lengths.cpu()
    return found
