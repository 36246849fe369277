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
from dataclasses import asdict, dataclass, field, replace
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from ..base import quiet_loading
from ..config import Formatting
from ..errors import ConfigError, RoutingError, TaskError
from ..experts.lora import LoraFactors
from ..files import new_directory, require_free
from ..sites import WrappedLinear, headless, linear_shape, replaced
from ..tasks.encoding import Cuts, Encoder
from ..tasks.prompt_passes import continued
from ..tasks.task import Example, neutral_examples
from .composition import Composition, composition_of, routing_for
from .layers import FoldedLinear, RoutedLayer, RoutedLinear, has_plain_weight, matrix_of
from .recording import SitePass, watch
from .routers.fixed import Weights
from .routers.router import SiteRouter

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

    def record(self, parts: Composition) -> dict[str, Any]:
        names = self.shares.experts
        sites = {
            site: {"shares": {z: w for z, w in zip(names, shares.tolist(), strict=True) if w}}
            | (asdict(self.losses[site]) if site in self.losses else {})
            for site, shares in self.shares.by_site.items()
        }
        return {
            "form": "merged model" if self.merged else "PEFT adapter",
            "base": asdict(parts.base),
            "router": parts.router.recorded.router,
            "chosen_for": self.shares.chosen_for,
            "experts": self.shares.whole(),
            "lost": self.lost,
            "fidelity": asdict(self.fidelity) if self.fidelity else None,
            "sites": sites,
        }


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
    late = [name for name, end in zip(parts.experts, parts.acting, strict=True) if end is not None]
    if late:
        raise RoutingError(
            f"From a prompt's end on act {', '.join(late)}, which no adapter or weight does; leave "
            f"them out (--leave-out)."
        )
    shares = shares_of(model, texts)
    updates = {
        site: update
        for site, layer in parts.layers.items()
        if not (update := fixed_update(layer, shares.by_site[site], parts)).is_nothing
    }
    losses: dict[str, CutLoss] = {}
    layers: dict[str, nn.Module] = {site: layer.base for site, layer in parts.layers.items()}
    if merged:
        layers |= {site: merged_layer(parts.layers[site], each) for site, each in updates.items()}
    else:
        updates, losses = _loras(updates, rank)
        layers |= {site: AddedUpdate(layers[site], each) for site, each in updates.items()}
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
            LoraFactors.write(work, _factors(updates), _about(model, parts))
        text = json.dumps(result.record(parts), indent=2) + "\n"
        (work / EXPORT_INFO).write_text(text, encoding="utf-8")
    return result


def _factors(updates: Mapping[str, Update]) -> dict[str, LoraFactors]:
    return {
        # A scale of 1, as an integer: Ollama wants one.
        site: LoraFactors(e.A.cpu(), e.B.cpu(), 1, None if e.bias is None else e.bias.cpu())
        for site, e in updates.items()
    }


def _about(model: PreTrainedModel, parts: Composition) -> dict[str, Any]:
    conv = any(isinstance(layer.base, Conv1D) for layer in parts.layers.values())
    about = {
        "base_model_name_or_path": parts.base.id,
        "revision": parts.base.revision,
        "task_type": "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM",
    }
    return about | ({"fan_in_fan_out": True} if conv else {})


# The texts that a mixture is chosen for and an export is compared on, as a model reads them.

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
    constant = constant_shares(parts)
    if constant is not None:
        return constant
    if texts is None:
        raise RoutingError(
            f"Router {parts.routing.name} chooses again for every "
            f"{'input' if parts.prompt_router else 'token'}, which an adapter can't hold: fix its "
            f"mixture with --prompt or --task, or route by merged or single."
        )
    if parts.tokenizer is None:
        raise ConfigError("To fix a mixture for texts, hand the base over with its tokenizer.")
    return shares_for(model, parts.tokenizer, texts)


def _constant(layer: RoutedLayer) -> Tensor | None:
    router: SiteRouter | None = getattr(layer, "router", None)
    return router.constant() if router is not None else None


def constant_shares(parts: Composition) -> Shares | None:
    """The shares where routing depends on no input, or there is one expert; else None."""
    router, shares = parts.router, {}
    for site, layer in parts.layers.items():
        weight: float | Tensor
        if isinstance(router, Weights) and router.weights:
            mixture = [router.weights.get(name, 0.0) for name in parts.experts]
            weight = torch.tensor(mixture, dtype=torch.float64)[layer.experts.cpu()]
        elif isinstance(layer, FoldedLinear):
            weight = layer.weight_of_each
        elif (constant := _constant(layer)) is not None:
            weight = constant.double().cpu()
        elif len(parts.experts) == 1:
            weight = 1.0
        else:
            return None
        shares[site] = torch.zeros(len(parts.experts), dtype=torch.float64)
        shares[site][layer.experts.cpu()] = weight
    return Shares(parts.experts, shares)


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


@dataclass(frozen=True)
class Update:
    """What experts at constant shares do at a site; parts that no one has are None."""

    A: Tensor  # [R, n]
    B: Tensor  # [d, R]
    bias: Tensor | None = None  # [d]
    input_factor: Tensor | None = None  # [n]
    output_factor: Tensor | None = None  # [d]

    @property
    def rank(self) -> int:
        return len(self.A)

    @property
    def is_lora(self) -> bool:
        return self.input_factor is None and self.output_factor is None

    @property
    def is_nothing(self) -> bool:
        return self.rank == 0 and self.bias is None and self.is_lora


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
    stack = layer.stack
    weights = shares.to(layer.experts.device)[layer.experts]
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
    downs = [each.A for each in constants if each.A is not None and len(each.A)]
    ups = [each.B for each in constants if each.B is not None and each.B.shape[1]]
    biases = [each.bias for each in constants if each.bias is not None and bool(each.bias.any())]
    scaled = [each.input_factor for each in constants if each.input_factor is not None]
    scales = [each.output_factor for each in constants if each.output_factor is not None]
    return Update(
        torch.cat(downs) if downs else weights.new_zeros(0, n).float(),
        torch.cat(ups, dim=1) if ups else weights.new_zeros(d, 0).float(),
        reduce(torch.add, biases) if biases else None,
        reduce(torch.mul, scaled) if scaled else None,
        reduce(torch.mul, scales) if scales else None,
    )


def _loras(
    updates: Mapping[str, Update], rank: int | None
) -> tuple[dict[str, Update], dict[str, CutLoss]]:
    for site, update in updates.items():
        if not update.is_lora:
            raise RoutingError(
                f"At {site} an expert scales the layer, which no LoRA does exactly: "
                f"export with --merged, or leave such experts out (--leave-out)."
            )
    if not updates:
        raise RoutingError("The experts change nothing at these shares; there is no adapter.")
    cuts = {site: cut(update, rank) for site, update in updates.items()}
    # PEFT may have a rank for each site, but many programs know one for all.
    widest = max(max(update.rank for update, _ in cuts.values()), 1)
    wide = {}
    for site, (update, _) in cuts.items():
        more = widest - update.rank
        A, B = functional.pad(update.A, (0, 0, 0, more)), functional.pad(update.B, (0, more))
        wide[site] = replace(update, A=A, B=B)
    return wide, {site: loss for site, (_, loss) in cuts.items()}


@torch.no_grad()
def cut(update: Update, rank: int | None = None) -> tuple[Update, CutLoss]:
    """`update` with a LoRA of at most this `rank`, the nearest there is, and what that loses.

    None cuts nothing off; then a rank beyond the site's own sizes is brought down to these, which
    loses no more than float32 rounds. Truncated singular values (Eckart and Young 1936), float64.
    """
    A, B = update.A.cpu().double(), update.B.cpu().double()  # not every device has float64
    right, left = torch.linalg.qr(A.T), torch.linalg.qr(B)
    # B A = Q_B (R_B R_Aᵀ) Q_Aᵀ: its SVD is that of the small matrix, and d x n is never formed.
    U, S, V = torch.linalg.svd(left.R @ right.R.T)
    norm = float(S.square().sum().sqrt())
    most = min(rank or update.rank, A.shape[1], B.shape[0])
    if update.rank <= most:
        return update, CutLoss(update.rank, update.rank, norm, 0.0)
    lost = float(S[most:].square().sum().sqrt())
    # Half of each singular value on either side, so that neither is far from the other's size.
    root = S[:most].sqrt()
    smaller = replace(
        update,
        A=(root[:, None] * (V[:most] @ right.Q.T)).float().to(update.A.device),
        B=((left.Q @ U[:, :most]) * root).float().to(update.B.device),
    )
    return smaller, CutLoss(most, update.rank, norm, lost)


class AddedUpdate(WrappedLinear):
    """A linear layer with a LoRA beside it, as PEFT computes it."""

    def __init__(self, base: nn.Module, update: Update) -> None:
        super().__init__(base, *linear_shape(base))
        self.update = update

    def forward(self, u: Tensor) -> Tensor:
        y: Tensor = self.base(u)
        update = self.update
        inner = functional.linear(u.to(update.A.dtype), update.A)
        more = functional.linear(inner.to(update.B.dtype), update.B)
        return y + (more if update.bias is None else more + update.bias).to(y.dtype)


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
