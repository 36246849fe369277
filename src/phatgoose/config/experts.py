"""The shapes of experts, one class for each kind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from .settings import AT_LEAST_1, POSITIVE, Settings, one_of

__all__ = [
    "ACTIVATIONS",
    "IA3",
    "KIND_NAMES",
    "PEFT_KINDS",
    "PLACEMENTS",
    "Bottleneck",
    "Lora",
    "Peft",
]

ACTIVATIONS = ("relu", "gelu", "silu")
PLACEMENTS = ("houlsby", "pfeiffer")

# Help texts of settings that several kinds of expert share, as one flag.
SITES = (
    "Regular expression to search for in a site's module path. Default: every linear layer of "
    "every block (lora); keys, values and the last feed-forward layer, as PEFT selects them for "
    "the base's architecture (ia3); the layers of the placement (bottleneck)."
)
INIT_STD = "Standard deviation of the initial A (lora) or D (bottleneck); B and U start at zero."


@dataclass(frozen=True)
class Lora(Settings):
    """The shape of a LoRA expert: W u + (alpha / rank) B A u at every site (paper section 3)."""

    rank: Annotated[int, "Rank r of each LoRA module.", AT_LEAST_1] = 16
    alpha: Annotated[float, "LoRA alpha; the update is scaled by alpha / rank.", POSITIVE] = 1.0
    init_std: Annotated[float, INIT_STD, POSITIVE] = 0.01
    sites: Annotated[str | None, SITES] = None


@dataclass(frozen=True)
class IA3(Settings):
    """The shape of an (IA)³ expert (Liu et al. 2022): l ⊙ (W u + b), or W (l ⊙ u) + b."""

    sites: Annotated[str | None, SITES] = None
    feedforward: Annotated[
        str | None,
        "Regular expression to search for: these sites scale their input instead of their output. "
        "Default: PEFT's choice (the last feed-forward layer).",
    ] = None


@dataclass(frozen=True)
class Bottleneck(Settings):
    """The shape of a bottleneck adapter: y + scale (U f(D y + b_D) + b_U) on a layer's output y."""

    placement: Annotated[
        str,
        "houlsby (after attention and after the feed-forward network of each block) or pfeiffer "
        "(only after the latter).",
        one_of(PLACEMENTS),
    ] = "houlsby"
    size: Annotated[int, "Size of the bottleneck.", AT_LEAST_1] = 64
    activation: Annotated[
        str, "Activation f in the bottleneck: relu, gelu or silu.", one_of(ACTIVATIONS)
    ] = "relu"
    scale: Annotated[float, "Factor on the adapter's output.", POSITIVE] = 1.0
    init_std: Annotated[float, INIT_STD, POSITIVE] = 0.01
    sites: Annotated[str | None, SITES] = None


Peft = Lora | IA3 | Bottleneck
PEFT_KINDS: dict[str, type[Peft]] = {"lora": Lora, "ia3": IA3, "bottleneck": Bottleneck}
KIND_NAMES = {"lora": "LoRA", "ia3": "(IA)³", "bottleneck": "bottleneck"}  # for people
