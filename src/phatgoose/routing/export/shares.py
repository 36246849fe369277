"""The constant share of each expert at each site: the routing's own, or that for some prompts.

The prompts that a mixture is chosen for and an export is compared on, as a model reads them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...config import Formatting
from ...errors import ConfigError, RoutingError, TaskError
from ...sites import headless, input_device
from ...tasks.encoding import Cuts, Encoder
from ...tasks.neutral import neutral_examples
from ...tasks.prompt_passes import continued
from ...tasks.task import Example
from ..composition import Composition, composition_of, routing_for
from ..layers import FoldedLinear, RoutedLayer
from ..recording import watch
from ..routers.few_shot import OneExpert
from ..routers.fixed import GivenWeights, UniformRouter
from ..routers.prompt_router import ChosenExperts
from ..watching import SitePass

ANSWER_TOKENS = 16  # of the greedy answer that the decoder of an encoder-decoder model reads
NEUTRAL = 8  # passages

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Texts:
    """Prompts, the inputs of `examples`, under the `name` of their task; targets are not read."""

    name: str
    examples: Sequence[Example]
    formatting: Formatting | None = None


def prompt_texts(prompts: Sequence[str], formatting: Formatting | None = None) -> Texts:
    """These prompts as Texts. Raises TaskError when one is empty."""
    if not all(prompts):
        raise TaskError("The prompt is empty.")
    return Texts("the prompt", [Example(prompt, "") for prompt in prompts], formatting)


def neutral_texts() -> Texts:
    """Passages of many kinds, to compare models where no prompts are given."""
    return Texts("neutral text", neutral_examples()[:NEUTRAL])


@torch.inference_mode()
def read_texts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Texts
) -> list[Inputs]:
    """The inputs of a pass of each prompt, one row each; a decoder's are `model`'s greedy answer.

    Raises as `routing_for` does, and TaskError where the base leaves no room for a prompt.
    """
    encoder = Encoder.for_model(model, tokenizer, texts.formatting)
    prompts = [encoder.fitted(each.input, each.passage) for each in texts.examples]
    lengths = [len(prompt.tokens) for prompt in prompts]
    Cuts.of([each.cut for each in prompts], lengths, encoder.positions.trained).report(texts.name)
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt.tokens], device=input_device(model))
        found.append({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    if encoder.is_encoder_decoder:
        for inputs in passing(model, tokenizer, texts, found):
            ids, mask = inputs["input_ids"], inputs["attention_mask"]
            answer = continued(model, tokenizer, ids, mask, ANSWER_TOKENS)
            inputs["decoder_input_ids"] = answer[:, : max(1, answer.shape[1] - 1)]
    return found


def passing(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Texts,
    inputs: Sequence[Inputs],
) -> Iterator[Inputs]:
    """The `inputs` one by one, each announced to routers of whole prompts (`routing_for`)."""
    prompts = [each["input_ids"][0].tolist() for each in inputs]
    encoder = Encoder.for_model(model, tokenizer, texts.formatting)
    with routing_for(
        model, prompts, task=texts.name, examples=texts.examples, encoder=encoder
    ) as before_pass:
        for row, each in enumerate(inputs):
            before_pass([row])
            yield each


# The constant share of each expert at each site: the routing's own, or that for some prompts.


@dataclass(frozen=True)
class Shares:
    """How much each of `experts` adds at each site, whatever the input: float64 [E] by site.

    `chosen_for` names the texts that the mixture was chosen for, None where routing is constant.
    """

    experts: tuple[str, ...]
    by_site: Mapping[str, Tensor]
    chosen_for: str | None = None

    def whole(self) -> dict[str, float]:
        mean = torch.stack(list(self.by_site.values())).mean(dim=0)
        return dict(zip(self.experts, mean.tolist(), strict=True))

    def at(self, site: str) -> dict[str, float]:
        """Those at one site that are not 0, by expert."""
        shares = zip(self.experts, self.by_site[site].tolist(), strict=True)
        return {name: share for name, share in shares if share}


def shares_of(model: PreTrainedModel, texts: Texts | None = None) -> Shares:
    """The shares of a routed `model`: constant ones, or else those for `texts`.

    Raises RoutingError when the model is not routed, or its routing is not constant and there are
    no texts; else as `shares_for` does.
    """
    parts = composition_of(model)
    constant = constant_shares(parts)
    if constant is not None:
        return constant
    if texts is None:
        routers = [getattr(layer, "router", None) for layer in parts.layers.values()]
        whole = any(isinstance(router, ChosenExperts) for router in routers)
        turn = "input" if whole else "token"
        raise RoutingError(
            f"Router {parts.routing.name} chooses again for every {turn}, which an adapter can't "
            f"hold: fix its mixture with --prompt or --task, or route by merged or single."
        )
    if parts.tokenizer is None:
        raise ConfigError("To fix a mixture for texts, hand the base over with its tokenizer.")
    return shares_for(model, parts.tokenizer, texts)


def constant_shares(parts: Composition) -> Shares | None:
    """The shares where routing depends on no input, or there is one expert; else None."""
    alone, router, weights = len(parts.experts) == 1, parts.prompt_router, {}
    given = router.weights if isinstance(router, GivenWeights) else {}
    mixture = torch.tensor([given.get(name, 0.0) for name in parts.experts], dtype=torch.float64)
    for site, layer in parts.layers.items():
        here = layer.experts.cpu()
        weight = mixture[here] if given else _fixed_weights(layer)
        if weight is None and not alone:
            return None
        weights[site] = torch.zeros(len(parts.experts), dtype=torch.float64)
        weights[site][here] = 1.0 if weight is None else weight
    return Shares(parts.experts, weights)


def _fixed_weights(layer: RoutedLayer) -> float | Tensor | None:
    if isinstance(layer, FoldedLinear):
        return layer.weight_of_each
    router = getattr(layer, "router", None)
    if isinstance(router, OneExpert):
        return router.share.double().cpu()
    return router.weight if isinstance(router, UniformRouter) else None


def shares_for(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Texts) -> Shares:
    """The mean weight of each expert at each site over a prompt's tokens, then over the prompts."""
    parts = composition_of(model)
    inputs = read_texts(model, tokenizer, texts)
    totals = _nothing(parts)
    for each in passing(model, tokenizer, texts, inputs):
        for site, mean in _mean_weights(model, parts, each).items():
            totals[site] += mean
    shares = {site: total / len(inputs) for site, total in totals.items()}
    return Shares(parts.experts, shares, chosen_for=texts.name)


def _nothing(parts: Composition) -> dict[str, Tensor]:
    return {site: torch.zeros(len(parts.experts), dtype=torch.float64) for site in parts.layers}


@torch.inference_mode()
def _mean_weights(model: PreTrainedModel, parts: Composition, inputs: Inputs) -> dict[str, Tensor]:
    sums, tokens = _nothing(parts), dict.fromkeys(parts.layers, 0)

    def add(passed: SitePass) -> None:
        weights = passed.dense_weights(len(parts.experts))
        sums[passed.site.name] += weights.double().sum(dim=0)
        tokens[passed.site.name] += len(weights)

    with watch(model, add):
        headless(model)(**inputs, use_cache=False)
    return {site: total / max(tokens[site], 1) for site, total in sums.items()}
