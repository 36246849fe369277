"""Export: a routed model with constant routing as a PEFT LoRA adapter, or as a plain model.

An adapter is exact where all experts are LoRAs: a sum of LoRAs is a LoRA of the sum of their ranks.
A merged model is exact for (IA)³ and DoRAs too. Nothing of ours is needed to load either. Routing
that isn't constant is made so: each site mixes the experts as the router does on average over some
texts, and the difference is measured.

Glossary: w_z the share of expert z, R the sum of the ranks. From `layers`, with constant w:

    y = (1 + Σ w_z (l_z - 1)) ⊙ (W (u ⊙ (1 + Σ w_z (l_z - 1))) + b) + Σ w_z (B_z A_z u + bias_z)

The LoRAs' part is one LoRA of rank R: A = [A_1; A_2; …], B = [w_1 B_1, w_2 B_2, …].
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from ..base import quiet_loading
from ..config import Formatting
from ..errors import RoutingError
from ..experts.kind import ModifiedLinear
from ..experts.lora import LoraFactors
from ..files import new_directory, require_free
from ..sites import headless, replaced
from ..tasks.batching import continued
from ..tasks.encoding import Cuts, Encoder
from ..tasks.task import Example, neutral_examples
from .compose import Composition, composition_of, routing_for
from .layers import FoldedLinear, RoutedLayer, RoutedLinear, has_plain_weight, matrix_of
from .recording import SitePass, watch

EXPORT_INFO = "phatgoose_export.json"
ANSWER_TOKENS = 16  # of the greedy answer that the decoder of an encoder-decoder model reads
NEUTRAL = 8  # passages


@dataclass(frozen=True)
class CutLoss:
    """A cut at a site: to `rank`, from factors of rank `of`.

    `norm` is the Frobenius norm of the update B A, `lost` that of what the cut took off.
    """

    rank: int
    of: int
    norm: float
    lost: float


@dataclass(frozen=True)
class Fidelity:
    """The export beside the routed model, on the tokens of some `texts` (their name).

    `difference` is the mean absolute difference of logits, over all `tokens` and the vocabulary;
    `agreement` the share of the tokens after which both would greedily say the same.
    """

    texts: str
    tokens: int
    difference: float
    agreement: float


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


@dataclass(frozen=True)
class Export:
    """What was exported to `folder`, and how near it is to the routed model.

    `losses` are an adapter's cuts by site, {} for a merged model. `fidelity` is None where the base
    came without a tokenizer.
    """

    folder: Path
    merged: bool
    shares: Shares
    losses: Mapping[str, CutLoss] = field(default_factory=dict)
    fidelity: Fidelity | None = None

    @property
    def rank(self) -> int:
        return max((loss.rank for loss in self.losses.values()), default=0)

    @property
    def lost(self) -> float:
        lost = math.hypot(*(loss.lost for loss in self.losses.values()))
        return lost / (math.hypot(*(loss.norm for loss in self.losses.values())) or 1.0)


def export(
    model: PreTrainedModel,
    out: str | Path,
    *,
    texts: Texts | None = None,
    merged: bool = False,
    rank: int | None = None,
) -> Export:
    """What was written of the routed `model` to the folder `out`, complete or not at all.

    Routing must be constant, or is fixed at its mean over `texts`. An adapter is one of PEFT's, of
    one rank at all sites; `rank` cuts it by SVD. `merged` writes the whole model with the updates
    in its weights, and the tokenizer. The logits are compared on `texts`, without any on neutral
    text.

    Raises RoutingError when the model is not routed, its routing is not constant and there are no
    texts, an expert can't be exported in this form, or `out` exists or can't be written; and what
    reading the texts does.
    """
    target, parts = Path(out), composition_of(model)
    require_free(target, RoutingError)
    if late := [name for name, tail in zip(parts.experts, parts.tails, strict=True) if tail]:
        raise RoutingError(
            f"From a prompt's end on act {', '.join(late)}, which no adapter or weight does; leave "
            f"them out (--leave-out)."
        )
    shares = shares_of(model, texts)
    updates = {
        site: fixed_update(layer, shares.by_site[site], parts)
        for site, layer in parts.layers.items()
    }
    losses: dict[str, CutLoss] = {}
    if merged:
        layers = {site: merged_layer(parts.layers[site], each) for site, each in updates.items()}
    else:
        loras, losses = _loras(updates, rank)
        layers = {
            site: ModifiedLinear(parts.layers[site].base, lora, model.dtype)
            for site, lora in loras.items()
        }
    near = None
    if parts.tokenizer is not None:
        near = fidelity(model, parts.tokenizer, layers, texts or neutral_texts())
    result = Export(target, merged, shares, losses, near)
    with new_directory(target, RoutingError) as work:
        if merged:
            with replaced(model, layers), torch.no_grad(), quiet_loading():
                type(model).save_pretrained(model, work)  # the model's own is that of routed models
            if parts.tokenizer is not None:
                parts.tokenizer.save_pretrained(work)
        else:
            about = {
                "base_model_name_or_path": parts.base.id,
                "revision": parts.base.revision,
                "task_type": "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM",
                "fan_in_fan_out": any(isinstance(e.base, Conv1D) for e in parts.layers.values()),
            }
            LoraFactors.write(work, loras, about)
        text = json.dumps(_record(result, parts), indent=2) + "\n"
        (work / EXPORT_INFO).write_text(text, encoding="utf-8")
    return result


def _record(result: Export, parts: Composition) -> dict[str, Any]:
    names, losses = result.shares.experts, result.losses
    return {
        "form": "merged model" if result.merged else "PEFT adapter",
        "base": asdict(parts.base),
        "router": parts.router.recorded.router,
        "chosen_for": result.shares.chosen_for,
        "experts": result.shares.whole(),
        "lost": result.lost,
        "fidelity": asdict(result.fidelity) if result.fidelity else None,
        "sites": {
            site: {"shares": {z: w for z, w in zip(names, shares.tolist(), strict=True) if w}}
            | (asdict(losses[site]) if site in losses else {})
            for site, shares in result.shares.by_site.items()
        },
    }


# The texts that a mixture is chosen for and an export is compared on, as a model reads them.

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Texts:
    """Prompts, the inputs of `examples`, under the `name` of their task; targets are not read."""

    name: str
    examples: Sequence[Example]
    formatting: Formatting | None = None


def prompt_texts(prompts: Sequence[str], formatting: Formatting | None = None) -> Texts:
    """These prompts as Texts."""
    return Texts("the prompt", [Example(prompt, "") for prompt in prompts], formatting)


def neutral_texts() -> Texts:
    """Passages of many kinds, to compare models where no prompts are given."""
    return Texts("neutral text", neutral_examples()[:NEUTRAL])


@torch.inference_mode()
def reading(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Texts
) -> Iterator[Inputs]:
    """The inputs of a pass of each prompt, announced; a decoder's are `model`'s greedy answer.

    Raises as `routing_for` does, and TaskError where the base leaves no room for a prompt.
    """
    encoder = Encoder.for_model(model, tokenizer, texts.formatting)
    fitted = [encoder.fitted(each.input) for each in texts.examples]
    prompts = [prompt.tokens for prompt in fitted]
    Cuts([each.cut for each in fitted]).report(texts.name)
    with routing_for(
        model, prompts, task=texts.name, examples=texts.examples, encoder=encoder
    ) as before_pass:
        for row, prompt in enumerate(prompts):
            before_pass([row])
            ids = torch.tensor([prompt], device=model.device)
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            if encoder.is_encoder_decoder:
                mask = inputs["attention_mask"]
                answer = continued(model, tokenizer, ids, mask, ANSWER_TOKENS)
                inputs["decoder_input_ids"] = answer[:, : max(1, answer.shape[1] - 1)]
            yield inputs


@torch.inference_mode()
def fidelity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    layers: Mapping[str, nn.Module],
    texts: Texts,
) -> Fidelity:
    """The routed `model` compared with itself with `layers` in place of the routed ones."""
    tokens, difference, same = 0, 0.0, 0
    for inputs in reading(model, tokenizer, texts):
        wanted = model(**inputs, use_cache=False).logits[0].float()
        with replaced(model, layers):
            got = model(**inputs, use_cache=False).logits[0].float()
        tokens += len(wanted)
        difference += float((got - wanted).abs().double().mean(dim=-1).sum())
        same += int((got.argmax(dim=-1) == wanted.argmax(dim=-1)).sum())
    return Fidelity(texts.name, tokens, difference / tokens, same / tokens)


# The constant share of each expert at each site: the routing's own, or that for some texts.


def shares_of(model: PreTrainedModel, texts: Texts | None = None) -> Shares:
    """The shares of a routed `model`: constant ones, or else the means for `texts`.

    Raises RoutingError when the model is not routed, or its routing is not constant and there are
    no texts.
    """
    parts = composition_of(model)
    weights: dict[str, Tensor | None] = {}  # of each expert if no input matters, [E]; else None
    for site, each in parts.layers.items():
        if isinstance(each, FoldedLinear):
            weights[site] = torch.full((len(each.experts),), each.weight_of_each)
        elif isinstance(each, RoutedLinear):
            constant = each.router.constant()
            is_one = constant is None and len(parts.experts) == 1
            weights[site] = torch.ones(1) if is_one else constant
    if all(each is not None for each in weights.values()):
        shares = {}
        for site, layer in parts.layers.items():
            shares[site] = torch.zeros(len(parts.experts), dtype=torch.float64)
            shares[site][layer.experts.cpu()] = weights[site].double().cpu()  # type: ignore[union-attr]
        return Shares(parts.experts, shares)
    if texts is None:
        raise RoutingError(
            f"Router {parts.routing.name} chooses again for every "
            f"{'input' if parts.prompt_router else 'token'}, which an adapter can't hold: fix its "
            f"mixture with --prompt or --task, or route by merged or single."
        )
    return shares_for(model, parts.tokenizer, texts)


@torch.inference_mode()
def shares_for(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Texts) -> Shares:
    """The mean weight of each expert at each site over a prompt's tokens, then over the prompts."""
    parts = composition_of(model)
    count, sizes = len(parts.experts), len(texts.examples)
    totals = {site: torch.zeros(count, dtype=torch.float64) for site in parts.layers}

    def add(passed: SitePass) -> None:
        totals[passed.site.name] += passed.dense_weights(count).double().mean(dim=0) / sizes

    for inputs in reading(model, tokenizer, texts):
        with watch(model, add):
            headless(model)(**inputs, use_cache=False)
    return Shares(parts.experts, totals, chosen_for=texts.name)


# What a site's experts come to at constant shares: factors of a LoRA, or a layer of its own.


class Update(NamedTuple):
    """What experts at constant shares do at a site, as `Constant`; A and B may have no rank."""

    A: Tensor  # [R, n]
    B: Tensor  # [d, R]
    bias: Tensor | None = None
    input_factor: Tensor | None = None
    output_factor: Tensor | None = None


def fixed_update(layer: RoutedLayer, shares: Tensor, parts: Composition) -> Update:
    """What the experts of `layer` do at these `shares` [E of the pool].

    Factors of weight 1 keep their type, weighted ones are float32. Raises RoutingError for a
    kind of expert that can't be said so (`Part.constant`), such as a bottleneck adapter.
    """
    n, d = layer.in_features, layer.out_features
    if not isinstance(layer, RoutedLinear):
        # Folded: of the update there is but the product.
        delta = layer.folded.float() - matrix_of(layer.base).float()  # type: ignore[operator]
        eye = torch.eye(min(n, d), dtype=delta.dtype, device=delta.device)
        A, B = (delta, eye) if d <= n else (eye, delta)
        used = A.any(dim=1) & B.any(dim=0)
        return Update(A[used], B[:, used])
    stack, weights = layer.stack, shares.to(layer.experts.device)[layer.experts]
    constants = []
    for name, rows in stack.rows().items():
        constant = stack.parts[name].constant(weights[rows])
        if constant is not None:
            constants.append(constant)
        elif bool(weights[rows].any()):
            row = int(rows[weights[rows].nonzero()[0, 0]])
            raise RoutingError(
                f"Expert {parts.experts[int(layer.experts[row])]!r} is of the kind {name!r}, which "
                f"neither a LoRA nor a weight can hold; leave it out (--leave-out)."
            )

    def every(field: str) -> list[Tensor]:
        return [t for each in constants if (t := getattr(each, field)) is not None]

    biases = [bias for bias in every("bias") if bool(bias.any())]
    downs, factors = every("A"), (every("input_factor"), every("output_factor"))
    return Update(
        torch.cat(downs) if downs else weights.new_zeros(0, n).float(),
        torch.cat(every("B"), dim=1) if downs else weights.new_zeros(d, 0).float(),
        reduce(torch.add, biases) if biases else None,
        *(reduce(torch.mul, each) if each else None for each in factors),
    )


def _loras(
    updates: Mapping[str, Update], rank: int | None
) -> tuple[dict[str, LoraFactors], dict[str, CutLoss]]:
    for site, update in updates.items():
        if update.input_factor is not None or update.output_factor is not None:
            raise RoutingError(
                f"At {site} an expert scales the layer, which no LoRA does exactly: "
                f"export with --merged, or leave such experts out (--leave-out)."
            )
    cuts = {site: cut(update, rank) for site, update in updates.items()}
    # PEFT may have a rank for each site, but many programs know one for all.
    widest = max(1, *(loss.rank for *_, loss in cuts.values()))
    loras = {}
    for site, (A, B, loss) in cuts.items():
        more, bias = widest - loss.rank, updates[site].bias
        A, B = functional.pad(A, (0, 0, 0, more)), functional.pad(B, (0, more))
        # A scale of 1, as an integer: Ollama wants one.
        loras[site] = LoraFactors(A.cpu(), B.cpu(), 1, None if bias is None else bias.cpu())
    return loras, {site: loss for site, (*_, loss) in cuts.items()}


@torch.no_grad()
def cut(update: Update, rank: int | None = None) -> tuple[Tensor, Tensor, CutLoss]:
    """The factors of `update` in a LoRA of at most this `rank`, the nearest there is, and its loss.

    None cuts nothing off; then a rank beyond the site's own sizes is brought down to these, which
    loses no more than float32 rounds. Truncated singular values (Eckart and Young 1936), float64.
    """
    A, B = update.A.cpu().double(), update.B.cpu().double()  # not every device has float64
    right, left = torch.linalg.qr(A.T), torch.linalg.qr(B)
    # B A = Q_B (R_B R_Aᵀ) Q_Aᵀ: its SVD is that of the small matrix, and d x n is never formed.
    U, S, V = torch.linalg.svd(left.R @ right.R.T)
    norm, whole = float(S.square().sum().sqrt()), len(A)
    most = min(rank or whole, A.shape[1], B.shape[0])
    if whole <= most:
        return update.A, update.B, CutLoss(whole, whole, norm, 0.0)
    lost = float(S[most:].square().sum().sqrt())
    # Half of each singular value on either side, so that neither is far from the other's size.
    root = S[:most].sqrt()
    A = (root[:, None] * (V[:most] @ right.Q.T)).float()
    return A, ((left.Q @ U[:, :most]) * root).float(), CutLoss(most, whole, norm, lost)


@torch.no_grad()
def merged_layer(layer: RoutedLayer, update: Update) -> nn.Module:
    """A layer of the base's own class with `update` inside its weight and bias.

    Summed in float32 (float64 in a float64 base) and rounded once, to the base's type. Raises
    RoutingError for a quantised or offloaded weight, and for a bias that the base has no place for.
    """
    base, name = layer.base, layer.site.name
    if not has_plain_weight(base) or not base.weight.is_floating_point():
        raise RoutingError(
            f"The base's weight at {name} is quantised or kept elsewhere, so that nothing can be "
            f"added to it: export an adapter, or load the base plainly."
        )
    if isinstance(layer, FoldedLinear):
        weight = layer.folded
    else:
        exact = torch.promote_types(base.weight.dtype, torch.float32)
        weight = matrix_of(base).to(exact)
        if update.input_factor is not None:
            weight = weight * update.input_factor
        if update.output_factor is not None:
            weight = weight * update.output_factor[:, None]
        weight = weight + update.B.to(exact) @ update.A.to(exact)
    parameters = {"weight": (weight.T if isinstance(base, Conv1D) else weight).contiguous()}
    if base.bias is not None:
        bias = base.bias if update.output_factor is None else base.bias * update.output_factor
        parameters["bias"] = bias if update.bias is None else bias + update.bias
    elif update.bias is not None:
        raise RoutingError(
            f"The experts add a bias at {name}, and the base has none there that could hold it: "
            f"export an adapter."
        )
    merged = copy.copy(base)
    merged._parameters = dict(base._parameters) | {
        name: nn.Parameter(tensor.to(base._parameters[name].dtype), requires_grad=False)
        for name, tensor in parameters.items()
    }
    return merged  # type: ignore[no-any-return]
