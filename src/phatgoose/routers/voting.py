"""One expert for a whole input, chosen by gates: router phatgoose-input.

Not in the paper, which chooses for every token at every site anew. In docs/study.md a pool of weak
experts is served better by one of them alone, and gates find it without an embedder. The symbols
are those of `phatgoose.routers.affinities`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..encoding import Encoder
from ..errors import RoutingError
from ..pool import Pool
from ..tasks import Example
from .affinities import CentredRouter, affinity_vectors
from .lookup import NOBODY, PromptReader

__all__ = ["GateVote", "Votes"]

Votes = Mapping[str, tuple[Tensor, Tensor]]  # by site: vectors [E, n + 1], experts [E] (indices)


class GateVote(PromptReader):
    """The expert z with the highest mean of v̄_zᵀ(u - M) / sqrt(var(u) + eps) / √n over an input.

    The mean is over the prompt's tokens, then over the sites where z acts and that the prompt
    passes (those of the encoder, where there is one). u is the base's own activation: the prompt
    passes through the model once with no expert at work.
    """

    name = "phatgoose-input"

    def __init__(
        self, votes: Votes, pool_size: int, eps: float, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        """`votes` are made by `votes_of`; `eps` is added to the variance of u."""
        super().__init__(tokenizer)
        self.votes, self.pool_size, self.eps = votes, pool_size, eps
        self._routers = {site: CentredRouter(rows, 1, eps) for site, (rows, _) in votes.items()}
        self._model: PreTrainedModel | None = None

    @staticmethod
    def votes_of(pool: Pool) -> Votes:
        """What the experts of `pool`, all with gates and means, vote with."""
        return {
            site: (
                affinity_vectors(pool, site, "gates", "centred"),
                torch.tensor([z for z, e in enumerate(pool.experts) if site in e.modules]),
            )
            for site in pool.sites
        }

    def attach(self, model: PreTrainedModel) -> None:
        """Find experts for every new prompt that `model` is given."""
        self._model = model
        super().attach(model)

    def find(self, examples: Sequence[Example]) -> Tensor:
        """The expert of each example; its answer choices play no part."""
        return self.of_prompts([example.input for example in examples])

    def of_prompts(self, texts: Sequence[str]) -> Tensor:
        """The expert of each prompt, int64 [texts]. Raises RoutingError when not attached."""
        return self.means(texts).argmax(dim=-1)

    @torch.no_grad()
    def means(self, texts: Sequence[str]) -> Tensor:
        """The mean affinity of each prompt and expert, float32 [texts, pool_size]."""
        model = self._model
        if model is None:
            raise RoutingError(f"Router {self.name} reads prompts with a model; compose one.")
        seq2seq = bool(model.config.is_encoder_decoder)
        stack = model.get_encoder() if seq2seq else model.base_model
        encoder = Encoder(self.tokenizer, is_encoder_decoder=seq2seq)
        found = []
        for text in texts:
            ids = torch.tensor([encoder.prompt(text)], device=model.device)
            with self._polled(model) as (sums, counts):
                stack(input_ids=ids, attention_mask=torch.ones_like(ids))
            found.append(sums / counts.clamp(min=1))
        return torch.stack(found) if found else torch.empty(0, self.pool_size)

    @contextmanager
    def _polled(self, model: PreTrainedModel) -> Iterator[tuple[Tensor, Tensor]]:
        """(sums over sites, their number) by expert, [pool_size] each, of the pass inside."""
        sums, counts = torch.zeros(self.pool_size), torch.zeros(self.pool_size)

        def poll(site: str, u: Tensor) -> None:
            router, (_, experts) = self._routers[site].to(u.device), self.votes[site]
            mean = router.affinities(u.reshape(-1, u.shape[-1])).mean(dim=0).cpu()
            sums[experts.cpu()] += mean
            counts[experts.cpu()] += 1

        def listen(site: str, layer: nn.Module) -> Any:
            return layer.register_forward_pre_hook(lambda _, args: poll(site, args[0]))

        rows, announced = self.rows, self._announced
        self.serve(torch.tensor([NOBODY]))
        layers: Mapping[str, Any] = {site: model.get_submodule(site) for site in self.votes}
        watchers = {site: layer.watcher for site, layer in layers.items()}
        for layer in layers.values():
            layer.watcher = None  # nobody's pass is nobody's routing
        handles = [listen(site, layer) for site, layer in layers.items()]
        try:
            yield sums, counts
        finally:
            for handle in handles:
                handle.remove()
            for site, watcher in watchers.items():
                layers[site].watcher = watcher
            self.rows, self._announced = rows, announced
