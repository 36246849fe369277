"""Export: a routed model with constant routing as a PEFT adapter or a plain model.

How far an export's logits are from the routed model's.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from ...base import quiet_loading
from ...errors import ConfigError, RoutingError
from ...experts.lora import LoraFactors
from ...experts.peft_files import INVOCATION
from ...files import new_directory, require_free
from ...passes import ActsOn
from ...sites import replaced
from ..composition import Composition, composition_of
from .shares import Inputs, Shares, Texts, neutral_texts, passing, read_texts, shares_of
from .updates import AddedUpdate, CutLoss, Update, cut, fixed_update, merged_layer, widened_to


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


@torch.inference_mode()
def fidelity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    layers: Mapping[str, nn.Module],
    texts: Texts,
) -> Fidelity:
    """The routed `model` compared with itself with `layers` in place of the routed ones.

    Raises as `read_texts` does.
    """
    tokens, difference, same = 0, 0.0, 0
    for inputs in passing(model, tokenizer, texts, read_texts(model, tokenizer, texts)):
        wanted = _logits(model, inputs)
        with replaced(model, layers):
            got = _logits(model, inputs)
        tokens += len(wanted)
        difference += float((got - wanted).abs().double().mean(dim=-1).sum())
        same += int((got.argmax(dim=-1) == wanted.argmax(dim=-1)).sum())
    return Fidelity(texts.name, tokens, difference / tokens, same / tokens)


def _logits(model: PreTrainedModel, inputs: Inputs) -> Tensor:
    logits: Tensor = model(**inputs, use_cache=False).logits
    return logits[0].float()


# Export: a routed model with constant routing as a PEFT LoRA adapter, or as a plain model.
#
# An adapter is exact where all experts are LoRAs: a sum of LoRAs is a LoRA of the sum of their
# ranks. A merged model is exact for (IA)³ too. Nothing of ours is needed to load either.

EXPORT_INFO = "phatgoose_export.json"


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
        lost, norm = (
            math.hypot(*(getattr(loss, name) for loss in self.losses.values()))
            for name in ("lost", "norm")
        )
        return lost / norm if norm else 0.0

    def record(self, parts: Composition) -> dict[str, Any]:
        sites = {
            site: {"shares": self.shares.at(site)}
            | (asdict(self.losses[site]) if site in self.losses else {})
            for site in self.shares.by_site
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

    Routing must be constant, or is made so: each site mixes the experts as the router does on
    average over `texts`. An adapter is one of PEFT's, of one rank at all sites; `rank` cuts it by
    SVD. `merged` writes the whole model with the updates in its weights, and the tokenizer. The
    logits are compared on `texts`, without any on neutral text.

    Raises RoutingError when the model is not routed, its routing is not constant and there are no
    texts, an expert can't be exported in this form, or `out` exists or can't be written;
    ConfigError for a rank that can't be; and what reading the texts does.
    """
    if rank is not None and (merged or rank < 1):
        raise ConfigError("rank is for adapters, and at least 1; a merged model has none.")
    target, parts = Path(out), composition_of(model)
    require_free(target, RoutingError)
    shares = shares_of(model, texts)
    acting = _acting(parts, shares, merged=merged)
    updates = {
        site: fixed_update(layer, shares.by_site[site], parts)
        for site, layer in parts.layers.items()
    }
    losses: dict[str, CutLoss] = {}
    layers: dict[str, nn.Module] = {site: layer.base for site, layer in parts.layers.items()}
    updates = {site: update for site, update in updates.items() if not update.is_nothing}
    if merged:
        layers |= {site: merged_layer(parts.layers[site], each) for site, each in updates.items()}
    else:
        updates, losses = _loras(updates, rank)
        active = _activity_of(parts, acting)
        layers |= {site: AddedUpdate(layers[site], each, active) for site, each in updates.items()}
    near = None
    if parts.tokenizer is not None:
        near = fidelity(model, parts.tokenizer, layers, texts or neutral_texts())
    result = Export(target, merged, shares, losses, near)
    with new_directory(target, RoutingError) as work:
        if merged:
            _write_model(model, layers, parts, work)
        else:
            about = _about(model, parts)
            if acting is not None:
                about[INVOCATION] = list(acting.invocation)
            LoraFactors.write(work, _factors(updates), about)
        text = json.dumps(result.record(parts), indent=2) + "\n"
        (work / EXPORT_INFO).write_text(text, encoding="utf-8")
    return result


def _acting(parts: Composition, shares: Shares, *, merged: bool) -> ActsOn | None:
    """The invocation that all exported experts act from on, None where all act on all tokens.

    Raises RoutingError, naming them, for experts that no one adapter or weight can stand for.
    """
    used = torch.stack(list(shares.by_site.values())).any(dim=0).tolist()
    found = {
        name: acts_on
        for name, acts_on, is_used in zip(parts.experts, parts.acting, used, strict=True)
        if is_used or shares.chosen_for is not None
    }
    named = ", ".join(name for name, acts_on in found.items() if acts_on is not None)
    if not named:
        return None
    where = f"From a prompt's end on act {named}"
    if merged:
        raise RoutingError(f"{where}, but weights act on all tokens; export an adapter.")
    if shares.chosen_for is not None:
        raise RoutingError(f"{where}, whose mixture can't be fixed for texts; route by merged.")
    ends = set(found.values())
    one = ends.pop()
    if ends or one is None or not one.invocation:
        raise RoutingError(
            f"{where}. PEFT has adapters for that, aLoRA, if all experts have the same invocation "
            f"tokens; export those, or leave these out (--leave-out)."
        )
    return one


def _activity_of(parts: Composition, acting: ActsOn | None) -> Callable[[int], Tensor | None]:
    context = parts.context
    if acting is None or context is None:
        return lambda tokens: None
    column = torch.tensor([context.acting.index(acting) + 1])
    return lambda tokens: context.active(column, tokens)


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
    return (
        {site: widened_to(update, widest) for site, (update, _) in cuts.items()},
        {site: loss for site, (_, loss) in cuts.items()},
    )


def _factors(updates: Mapping[str, Update]) -> dict[str, LoraFactors]:
    return {
        site: LoraFactors(
            # A scale of 1, as an integer: Ollama wants one.
            each.A.cpu(),
            each.B.cpu(),
            1,
            None if each.bias is None else each.bias.cpu(),
        )
        for site, each in updates.items()
    }


def _about(model: PreTrainedModel, parts: Composition) -> dict[str, Any]:
    conv = any(isinstance(layer.base, Conv1D) for layer in parts.layers.values())
    about = {
        "base_model_name_or_path": parts.base.id,
        "revision": parts.base.revision,
        "task_type": "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM",
    }
    return about | ({"fan_in_fan_out": True} if conv else {})


def _write_model(
    model: PreTrainedModel, layers: Mapping[str, nn.Module], parts: Composition, folder: Path
) -> None:
    with replaced(model, layers), torch.no_grad(), quiet_loading():
        type(model).save_pretrained(model, folder)  # the model's own is that of routed models
    if parts.tokenizer is not None:
        parts.tokenizer.save_pretrained(folder)
