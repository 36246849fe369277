"""Routing distributions: probabilities averaged over tokens, by site (paper section 4.4)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..files import one_line
from ..routing.choice import Choice
from ..routing.compose import Composition, composition_of, routing_for
from ..routing.recording import SitePass, watch
from ..sites import Stream, headless
from ..tasks.batching import batches_of_tokens, pad_right, padded_rows
from ..tasks.encoding import Encoder, TokenPair, Tokens
from ..tasks.task import Task
from .measures import Array

STACKS = ("encoder", "decoder")


@dataclass(frozen=True)
class SiteLabel:
    """Where a site is: its `stack` ("" in a model of one), `layer` from 0 (-1: none) and `kind`.

    A kind is what a site is called in every block, such as "self_attn.q_proj".
    """

    stack: str
    layer: int
    kind: str

    @property
    def layer_name(self) -> str:
        return f"{self.stack} {self.layer}".strip()


def site_label(site: str) -> SiteLabel:
    """The stack, block and kind in a name; the block is -1 for a site outside of blocks."""
    stack = ""
    layer = -1
    kind = []
    for part in site.split("."):
        if part in STACKS:
            stack = stack or part
        if part.isdigit() and layer < 0:
            layer = int(part)
        elif layer >= 0 and not part.isdigit() and part != "layer":
            kind.append(part)
    return SiteLabel(stack, layer, ".".join(kind) or site)


def layers_and_kinds(labels: Iterable[SiteLabel]) -> tuple[list[str], list[str]]:
    """The names of layers by number, and those of kinds in the order in which they come."""
    labels = list(labels)
    stacks = list(dict.fromkeys(label.stack for label in labels))
    kinds = dict.fromkeys(label.kind for label in labels)
    labels.sort(key=lambda label: (stacks.index(label.stack), label.layer))
    layers = dict.fromkeys(label.layer_name for label in labels)
    return list(layers), list(kinds)


# Called at each site of a pass, with 0 for prompt and 1 for answer, [rows, tokens] by stream.
Seer = Callable[[SitePass, Mapping[Stream, Tensor]], None]


def read_task(
    model: PreTrainedModel, encoder: Encoder, task: Task, experts: Sequence[str], budget: int
) -> tuple[RoutingDistribution, Array]:
    """Pass the prompts and right answers of `task.test` through the routed `model`, once each.

    So all routers read the same tokens. (The released code's distributions take the answer that the
    model chose.) The distribution is over `experts`, those of a pool; the model may have some of
    them only. The second array has the weights [prompts, E] of those that were chosen for each
    prompt, in no order of the data's. It has no rows for a router that chooses for tokens.
    """
    parts = composition_of(model)
    tally = RoutingTally(experts, parts)
    pairs = encoder.pairs(task.test)
    prompts = [pair.prompt for pair in pairs]
    title = f"routing of {one_line(task.name)}"
    rows = []
    with (
        tqdm(total=len(pairs), desc=title, disable=None, leave=False) as bar,
        routing_for(model, prompts, task=task.name, examples=task.test) as before_pass,
    ):
        for batch in batches_of_tokens([pair.length for pair in pairs], budget):
            before_pass(batch)
            pass_through(model, encoder, [pairs[index] for index in batch], tally.add)
            choice = parts.context.choice if parts.context else None
            for weights in chosen_for_prompts(parts, choice):
                rows.append([weights.get(expert, 0.0) for expert in experts])
            bar.update(len(batch))
    return tally.distribution, np.array(rows, dtype=float).reshape(-1, len(experts))


def chosen_for_prompts(parts: Composition, choice: Choice | None) -> list[dict[str, float]]:
    """The experts of each prompt in `choice`; none if the router chooses for tokens."""
    if choice is None or parts.chooser is None or not parts.chooser.router.chooses:
        return []
    return choice.named(parts.experts)


def pass_through(
    model: PreTrainedModel, encoder: Encoder, pairs: Sequence[TokenPair], see: Seer
) -> None:
    """Show `see` what the routed sites decide on `pairs`, in one pass without gradients."""
    inputs = {}
    parts = {}
    streams_by_pair = [streams_of(model, pair) for pair in pairs]
    streams = list(streams_by_pair[0])
    pad = encoder.tokenizer.pad_token_id
    for stream in streams:
        rows, marks = zip(*(by_stream[stream] for by_stream in streams_by_pair), strict=True)
        prefix = "decoder_" if stream != streams[0] else ""
        ids, mask = padded_rows(pad_right, rows, pad, model.device)
        inputs[f"{prefix}input_ids"] = ids
        inputs[f"{prefix}attention_mask"] = mask
        parts[stream] = pad_right(marks, 0)
    with watch(model, lambda passed: see(passed, parts)), torch.inference_mode():
        headless(model)(**inputs, use_cache=False)


def streams_of(model: PreTrainedModel, pair: TokenPair) -> dict[Stream, tuple[Tokens, Tokens]]:
    """The tokens that pass each stack, and for each token 0 in the prompt and 1 in the answer."""
    # The target's last token, the end of the sequence, is never read, as in scoring.
    prompt = pair.prompt
    answer = pair.target[:-1]
    zeros = [0] * len(prompt)
    if model.config.is_encoder_decoder:
        answer = [model.config.decoder_start_token_id, *answer]
        return {"encoder": (prompt, zeros), "decoder": (answer, [1] * len(answer))}
    return {"decoder": (prompt + answer, zeros + [1] * len(answer))}


Part = Literal["prompt", "answer"]
PARTS: tuple[Part, ...] = get_args(Part)
Measure = Literal["probability", "weight", "chosen", "first"]
MEASURES: tuple[Measure, ...] = get_args(Measure)


@dataclass(frozen=True)
class RoutingDistribution:
    """How one router spread the tokens of a dataset over the experts: sums over real tokens.

    `tokens[site]` [2] counts the tokens of prompts and answers. `sums[measure][site]` is [2, E]:
    "probability" adds up the distribution before top-k, "weight" the weights in use, "chosen"
    counts how often an expert was among the k, "first" how often it had the greatest weight (shared
    among equals). `entropies[site]` [2] adds up the entropy of each token's distribution.
    """

    experts: tuple[str, ...]
    tokens: Mapping[str, Array]
    sums: Mapping[Measure, Mapping[str, Array]]
    entropies: Mapping[str, Array]

    @cached_property
    def labels(self) -> dict[str, SiteLabel]:
        return {site: site_label(site) for site in self.tokens}

    def by_site(self, measure: Measure = "weight", part: Part | None = None) -> dict[str, Array]:
        """Mean of `measure` over the tokens of `part` (None: all), [E] by site that any passed."""
        rows = {}
        for site, sums in self.sums[measure].items():
            count = _of(self.tokens[site], part)
            if count > 0:
                rows[site] = _of(sums, part) / count
        return rows

    def by_layer(self) -> dict[str, Array]:
        """Unweighted mean weight over the sites of each layer, [E] by `SiteLabel.layer_name`."""
        return self._grouped(lambda label: label.layer_name, "weight")

    def by_kind(self) -> dict[str, Array]:
        """Unweighted mean weight over the sites of each kind, [E] by `SiteLabel.kind`."""
        return self._grouped(lambda label: label.kind, "weight")

    def whole(self, measure: Measure = "weight", part: Part | None = None) -> Array:
        """Unweighted mean over all sites, [E] (paper section 4.4); zeros if nothing passed."""
        groups = self._grouped(lambda _: "", measure, part)
        return groups.get("", np.zeros(len(self.experts)))

    def token_entropy(self) -> float:
        """Mean entropy of one token's distribution at one site: over tokens, then over sites.

        It is 0 if nothing passed. `entropy(whole("probability"))` less this is the mutual
        information of expert with token and site.
        """
        means = []
        for site, total in self.entropies.items():
            count = self.tokens[site].sum()
            if count > 0:
                means.append(float(total.sum() / count))
        return sum(means) / max(1, len(means))

    def passed(self, part: Part | None = None) -> int:
        """Tokens of `part` at the site that most of them passed."""
        return int(max((_of(count, part) for count in self.tokens.values()), default=0))

    def _grouped(
        self, key: Callable[[SiteLabel], str], measure: Measure, part: Part | None = None
    ) -> dict[str, Array]:
        groups: dict[str, list[Array]] = defaultdict(list)
        for site, mean in self.by_site(measure, part).items():
            groups[key(self.labels[site])].append(mean)
        return {name: np.mean(rows, axis=0) for name, rows in groups.items()}


class RoutingTally:
    """Adds up routing decisions: a few numbers per site and expert, however many tokens pass."""

    def __init__(self, experts: Sequence[str], parts: Composition) -> None:
        self.experts = tuple(experts)
        self._columns = torch.tensor([self.experts.index(name) for name in parts.experts])
        self._layers = parts.layers
        self._sums = defaultdict[str, dict[str, Tensor]](dict)

    def add(self, passed: SitePass, parts: Mapping[Stream, Tensor]) -> None:
        site = passed.site.name
        groups = _groups(passed, parts)  # [2, T]
        # A mixture may subtract an expert.
        dense = passed.dense_weights(len(self._columns)).abs()
        used = torch.zeros(len(dense), len(self.experts)).index_copy_(1, self._columns, dense)
        before_top_k = passed.distribution().detach().float().cpu()
        columns = self._columns[self._layers[site].experts.cpu()]
        probabilities = torch.zeros_like(used).index_copy_(1, columns, before_top_k)
        best = used.amax(dim=1, keepdim=True)
        first = ((used == best) & (used > 0)).float()
        rows = {
            "probability": probabilities,
            "weight": used,
            "chosen": (used > 0).float(),
            "first": first / first.sum(dim=1, keepdim=True).clamp(min=1),
            "tokens": torch.ones_like(best),
            "entropies": torch.special.entr(probabilities).sum(dim=1, keepdim=True),
        }
        for name, row in rows.items():
            # In float64: float32 sums over millions of tokens lose what single ones add.
            self._sums[name][site] = self._sums[name].get(site, 0) + groups @ row.double()

    @property
    def distribution(self) -> RoutingDistribution:
        return RoutingDistribution(
            self.experts,
            self._copied("tokens", 0),
            {measure: self._copied(measure) for measure in MEASURES},
            self._copied("entropies", 0),
        )

    def _copied(self, name: str, column: int | slice = slice(None)) -> dict[str, Array]:
        return {site: sums[:, column].numpy().copy() for site, sums in self._sums[name].items()}


def _groups(passed: SitePass, parts: Mapping[Stream, Tensor]) -> Tensor:
    counted = passed.is_real()
    part = parts.get(passed.site.stream)
    if part is None or part.shape != counted.shape:
        part = torch.zeros(counted.shape, dtype=torch.long)  # all tokens count as prompt
    answers = part.cpu() == 1
    groups = torch.stack([~answers & counted, answers & counted])
    return groups.flatten(1).double()


def _of(sums: Array, part: Part | None) -> Array:
    if part is None:
        return np.asarray(sums.sum(axis=0))
    return np.asarray(sums[PARTS.index(part)])
