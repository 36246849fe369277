"""LoGo: the experts whose updates of one layer are longest at the prompt's end.

Lee et al., ACL 2026 (arXiv 2511.07129), with its norm, not its entropy. At the query projection of
the last block, s_z = |scale_z B_z A_z h| for the last token's h; the k experts with the highest s
act on the whole input, Σ w B A u at every site with w_z = s_z / Σ s over those k. k is 20 as there.

As in the released code, h is the stream that enters the block, before the block's norm; the
projection itself, and a LoRA there, is given what comes out of that norm, which the setting
reads=site reads. There h comes from a pass with experts at work, all at once for the first input
and then those that the input before had chosen; here from the base alone, so that an input's
experts depend on nothing but the input.

The last block is the last one where LoRAs act, the encoder's in encoder-decoder models. Where none
act at a query projection it is the block's first site that has some. Experts that don't act there
score 0.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...base.blocks import blocks_of
from ...base.sites import Site
from ...errors import RoutingError
from ...experts.pool import Pool
from ...tasks.prompt_passes import PromptReading, last_token
from ..layers import RoutedLinear
from .prompt_router import BaseReader, LookedUp
from .router import Lookup, Mixtures, SavedLookup, Scores, highest

QUERY = re.compile(r"(^|\.)(q|q_proj|q_lin|query|c_attn|query_key_value|qkv_proj|Wqkv)$")
SMALLEST = 1e-20  # of a sum of scores


class Logo(LookedUp):
    """Router logo."""

    def lookup_of(
        self, pool: Pool, scores: Scores | None, tokenizer: PreTrainedTokenizerBase | None
    ) -> Lookup:
        """What reads prompts. Raises ConfigError without `tokenizer`."""
        return self._reader(len(pool), tokenizer)

    def saved_lookup(self, saved: SavedLookup, tokenizer: PreTrainedTokenizerBase | None) -> Lookup:
        """The same, for a saved model; what it scores with are the experts themselves."""
        return self._reader(saved.experts, tokenizer)

    def _reader(self, pool_size: int, tokenizer: PreTrainedTokenizerBase | None) -> LogoReader:
        at_site = self.config.reads == "site"
        return LogoReader(self.needed(tokenizer), pool_size, self.input_k, at_site=at_site)


class LogoReader(BaseReader):
    """The k experts with the longest updates at one site, weighted by their lengths."""

    name = "logo"

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, pool_size: int, k: int, *, at_site: bool = False
    ) -> None:
        """`at_site` reads what the site is given, rather than what enters its block."""
        super().__init__(tokenizer, k)
        self.pool_size, self.at_site = pool_size, at_site

    def reading(self, model: PreTrainedModel) -> PromptReading:
        """The lengths of all updates."""
        return _Lengths(_probed(model), self.pool_size, at_site=self.at_site)

    def mixed(self, scores: Tensor) -> Mixtures:
        """The k highest of `scores` [texts, pool_size], each weighted by its share of their sum."""
        experts = highest(scores, min(self.k, scores.shape[1]))
        chosen = scores.gather(1, experts)
        return Mixtures(experts, chosen / chosen.sum(dim=1, keepdim=True).clamp(min=SMALLEST))

    def grown(self, pool: Pool, first: int) -> LogoReader:
        """The reader of those experts too."""
        return LogoReader(self.tokenizer, first + len(pool), self.k, at_site=self.at_site)

    def shrunk(self, place: Tensor) -> LogoReader:
        """The reader of the experts that stay."""
        left = int((place >= 0).sum())
        return LogoReader(self.tokenizer, left, self.k, at_site=self.at_site)


@dataclass(frozen=True)
class _Probe:
    """The routed layer that is looked at, and the index of its block."""

    layer: RoutedLinear
    block: int


def _probed(model: PreTrainedModel) -> _Probe:
    """The query projection of the last block where LoRAs act, or the first such site of it."""
    blocks = blocks_of(model)
    for index in reversed(range(len(blocks))):
        layers = {
            name: layer
            for name, layer in blocks[index].named_modules()
            if isinstance(layer, RoutedLinear) and layer.stack.lora is not None
        }
        if layers:
            chosen = next((name for name in layers if QUERY.search(name)), next(iter(layers)))
            return _Probe(layers[chosen], index)
    raise RoutingError("Router logo reads a block that reads prompts, and no LoRA acts in one.")


class _Lengths(PromptReading):
    """|scale B A h| of every expert for the last token of each text."""

    def __init__(self, probe: _Probe, pool_size: int, *, at_site: bool) -> None:
        self._layer, self._pool_size = probe.layer, pool_size
        if at_site:
            self.sites = {probe.layer.site.name: probe.layer.site}
        else:
            self.blocks = (probe.block - 1,)  # what comes out of one block enters the next

    def begin(self, mask: Tensor) -> None:
        """A batch comes."""
        self._mask, self._found = mask, torch.zeros(len(mask), self._pool_size)

    def see_site(self, site: Site, u: Tensor) -> None:
        """What the site is given."""
        self._read(u)

    def see_block(self, index: int, hidden: Tensor) -> None:
        """What enters its block. Raises RoutingError where the site takes another size."""
        if hidden.shape[-1] != self._layer.in_features:
            raise RoutingError(
                f"Router logo reads {hidden.shape[-1]} features before the block, but LoRAs act on "
                f"{self._layer.in_features} at {self._layer.site.name}; use logo:reads=site."
            )
        self._read(hidden)

    def found(self) -> Tensor:
        """The lengths [texts, pool_size]."""
        return self._found

    def _read(self, activations: Tensor) -> None:
        stack = self._layer.stack
        if stack.lora is None:
            raise RoutingError(f"There is no LoRA at {self._layer.site.name}.")
        h = last_token(activations, self._mask).to(stack.lora.A.device).float()
        inside = torch.einsum("tn,ern->ter", h, stack.lora.A.float())
        lengths = torch.einsum("ter,erd->ted", inside, stack.lora.B.float()).norm(dim=-1)
        experts = stack.experts[stack.rows()["lora"]].cpu()
        self._found[:, experts] = lengths.cpu()
