"""Settings, as frozen dataclasses: one place for names, defaults, help texts and checks.

The command line derives its flags from these classes and recipes (TOML) fill them, so a setting
exists exactly once. Defaults are the paper's (section 3 of METHOD; Muqeeth et al. 2024, section 4.1
and the released code) unless the help text says otherwise.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from numbers import Integral, Real
from types import NoneType
from typing import Annotated, Any, TypeVar, get_args, get_type_hints

from .errors import ConfigError

__all__ = [
    "ACTIVATIONS",
    "IA3",
    "KIND_NAMES",
    "PEFT_KINDS",
    "PLACEMENTS",
    "SUITE_NAMES",
    "TASK_FILES",
    "TRUNCATIONS",
    "Bottleneck",
    "Formatting",
    "GateTraining",
    "Lora",
    "Peft",
    "Routing",
    "Serving",
    "Setting",
    "Settings",
    "Training",
    "from_mapping",
    "require_one_of",
    "settings_of",
]

Config = TypeVar("Config")

TASK_FILES = (".csv", ".jsonl")
# What `suites.registry.SUITES` knows by name; in a recipe these words are no file names.
SUITE_NAMES = ("t0hi", "t0ho", "flan", "bbh", "bbl", "bbh-23", "bbl-24")
ACTIVATIONS = ("relu", "gelu", "silu")
PLACEMENTS = ("houlsby", "pfeiffer")
SEEDS = 1 << 32  # what numpy takes, which Trainer seeds too
TYPE_NAMES = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
TRUNCATIONS = ("middle", "left", "right")

# Help texts of settings that several kinds of expert have, and that are one flag therefore.
SITES = (
    "Regular expression that a site's module path must match (search); default: every linear layer "
    "of every block (lora), keys, values and the feed-forward network's last layer as PEFT chooses "
    "them for the base's kind (ia3), the layers that the placement names (bottleneck)."
)
INIT_STD = "Standard deviation of the initial A (lora) or D (bottleneck); B and U start at zero."


class Settings:
    """What all classes of settings share: each value is of a type that its field is annotated with.

    They are frozen dataclasses whose fields are `Annotated[type, help text]`. Numbers of other
    makes (numpy's) become Python's, and whole ones given for a float become floats. Subclasses
    check ranges in their own `__post_init__`, after this one.
    """

    def __post_init__(self) -> None:
        """Raise ConfigError for a value of the wrong type, or a number that is not finite."""
        for setting in settings_of(type(self)):
            value = _typed(setting, getattr(self, setting.name))
            object.__setattr__(self, setting.name, value)


@dataclass(frozen=True)
class Lora(Settings):
    """The shape of a LoRA expert: W u + (alpha / rank) B A u at every site (METHOD section 3.1)."""

    rank: Annotated[int, "Rank r of each LoRA module."] = 16
    alpha: Annotated[float, "LoRA alpha; the update is scaled by alpha / rank."] = 1.0
    init_std: Annotated[float, INIT_STD] = 0.01
    sites: Annotated[str | None, SITES] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.rank >= 1, "rank", self.rank, "at least 1")
        _require(self.alpha > 0, "alpha", self.alpha, "above 0")
        _require(self.init_std > 0, "init_std", self.init_std, "above 0")


@dataclass(frozen=True)
class IA3(Settings):
    """The shape of an (IA)³ expert (Liu et al. 2022): l ⊙ (W u + b), or W (l ⊙ u) + b."""

    sites: Annotated[str | None, SITES] = None
    feedforward: Annotated[
        str | None,
        "Which of them have their input scaled, not their output (regular expression, search); "
        "default: PEFT's choice (the last layer of the feed-forward network).",
    ] = None


@dataclass(frozen=True)
class Bottleneck(Settings):
    """The shape of a bottleneck adapter: y + scale (U f(D y + b_D) + b_U) on a layer's output y."""

    placement: Annotated[
        str,
        "houlsby (after attention and feed-forward network of each block) or pfeiffer (after "
        "the latter only).",
    ] = "houlsby"
    size: Annotated[int, "Size of the bottleneck."] = 64
    activation: Annotated[str, "Activation f in the bottleneck: relu, gelu or silu."] = "relu"
    scale: Annotated[float, "The adapter's output is scaled by this."] = 1.0
    init_std: Annotated[float, INIT_STD] = 0.01
    sites: Annotated[str | None, SITES] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require_one_of(PLACEMENTS, "placement", self.placement)
        require_one_of(ACTIVATIONS, "activation", self.activation)
        _require(self.size >= 1, "size", self.size, "at least 1")
        _require(self.scale > 0, "scale", self.scale, "above 0")
        _require(self.init_std > 0, "init_std", self.init_std, "above 0")


Peft = Lora | IA3 | Bottleneck
PEFT_KINDS: dict[str, type[Peft]] = {"lora": Lora, "ia3": IA3, "bottleneck": Bottleneck}
KIND_NAMES = {"lora": "LoRA", "ia3": "(IA)³", "bottleneck": "bottleneck"}  # for people


@dataclass(frozen=True)
class Training(Settings):
    """How an expert is trained (METHOD section 3.1)."""

    steps: Annotated[int, "Optimiser steps."] = 1000
    batch_size: Annotated[int, "Sequences per optimiser step."] = 1024
    micro_batch_size: Annotated[int, "Sequences per forward pass; the rest is accumulated."] = 8
    learning_rate: Annotated[float, "AdamW learning rate."] = 5e-3
    warmup_ratio: Annotated[float, "Share of the steps with a rising learning rate."] = 0.06
    weight_decay: Annotated[float, "AdamW weight decay."] = 0.0
    max_grad_norm: Annotated[float, "Gradient clipping by global norm."] = 1.0
    eval_every: Annotated[
        int, "Validate, keep a checkpoint and remember the best one, every so many steps."
    ] = 100
    eval_examples: Annotated[int, "At most so many validation examples are used."] = 500
    seed: Annotated[int, "Seed of initialisation, data order and validation split."] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("steps", "batch_size", "micro_batch_size", "eval_every", "eval_examples"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        _require(self.learning_rate > 0, "learning_rate", self.learning_rate, "above 0")
        _require(0 <= self.warmup_ratio <= 1, "warmup_ratio", self.warmup_ratio, "from 0 to 1")
        _require(self.weight_decay >= 0, "weight_decay", self.weight_decay, "0 or more")
        _require(self.max_grad_norm > 0, "max_grad_norm", self.max_grad_norm, "above 0")
        _require_seed("seed", self.seed)


@dataclass(frozen=True)
class GateTraining(Settings):
    """How the gates are trained (METHOD section 3.2), and what else is measured for other routers.

    Batch size, warm-up, clipping, weight decay and seed are those of `Training`, as in the paper.
    """

    joint: Annotated[
        bool,
        "Train gates together with the expert in one go, instead of after it (Appendix A); steps "
        "and learning rate are then the expert's.",
    ] = False
    gate_steps: Annotated[int, "Optimiser steps of gate training."] = 100
    gate_learning_rate: Annotated[
        float | None, "Learning rate of gate training; default: that of the expert."
    ] = None
    statistics_examples: Annotated[
        int, "Training examples measured for mean activations and embeddings."
    ] = 1000
    means: Annotated[bool, "Measure each site's mean activation (for average-activation)."] = True
    embeddings: Annotated[
        bool, "Embed training inputs (for retrieval; needs the extra 'retrieval')."
    ] = False
    embedder: Annotated[str, "Sentence embedder: a Hub id or a local folder."] = (
        "sentence-transformers/all-MiniLM-L6-v2"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.gate_steps >= 1, "gate_steps", self.gate_steps, "at least 1")
        _require(
            self.statistics_examples >= 1,
            "statistics_examples",
            self.statistics_examples,
            "at least 1",
        )
        rate = self.gate_learning_rate
        _require(rate is None or rate > 0, "gate_learning_rate", rate, "above 0")


@dataclass(frozen=True)
class Formatting(Settings):
    """How an example becomes tokens."""

    max_input_tokens: Annotated[int, "Longer inputs are cut to so many tokens."] = 512
    truncation: Annotated[
        str,
        "What such a cut takes away: middle (of a template's longest field where it is known, else "
        "of the input; three times as much is kept behind as before), left or right (the paper's).",
    ] = "middle"
    max_target_tokens: Annotated[
        int, "Targets are cut on the right to so many tokens, with a warning."
    ] = 512
    chat: Annotated[bool, "Wrap inputs in the base model's chat template."] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("max_input_tokens", "max_target_tokens"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        require_one_of(TRUNCATIONS, "truncation", self.truncation)


@dataclass(frozen=True)
class Routing(Settings):
    """How a routed model chooses experts (METHOD section 4)."""

    router: Annotated[
        str,
        "phatgoose, phatgoose-input, average-activation, arrow, uniform-top-k, retrieval, merged, "
        "random, single, oracle or best-individual.",
    ] = "phatgoose"
    k: Annotated[int, "Experts per token at each site."] = 2
    kernel: Annotated[str, "auto, reference, concat, gather, grouped, native or triton."] = "auto"
    eps: Annotated[float, "Added to var(u) under the root when u is standardised."] = 1e-5
    expert: Annotated[str | None, "The expert of router single."] = None
    arrow: Annotated[str, "Form of router arrow: svd (the paper's), peft or mttl."] = "svd"
    router_seed: Annotated[int, "Seed of router random."] = 0
    stand_in: Annotated[
        bool, "Let experts without gates join: their Arrow vector stands in, which is a guess."
    ] = False
    affinity: Annotated[
        str, "How gates or means meet activations: standardised (paper), raw, trimmed or centred."
    ] = "standardised"
    router_temperature: Annotated[float, "Divides affinities before the softmax over the k."] = 1.0
    retrieval_embedder: Annotated[
        str | None, "Router retrieval's embedder, to be named where it isn't the default one."
    ] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.k >= 1, "k", self.k, "at least 1")
        for name in ("eps", "router_temperature"):
            _require(getattr(self, name) > 0, name, getattr(self, name), "above 0")
        _require_seed("router_seed", self.router_seed)


@dataclass(frozen=True)
class Serving(Settings):
    """The limits of `phatgoose serve` (docs/serving.md)."""

    max_tokens: Annotated[int, "Tokens to generate for one answer at most."] = 1024
    max_choices: Annotated[int, "Answers to one request at most (its prompts times its n)."] = 64
    max_queue: Annotated[int, "Answers that may wait; further requests are turned away."] = 256
    max_client_queue: Annotated[int, "Answers of one client that may wait."] = 128
    max_batch_tokens: Annotated[
        int, "Tokens of all answers computed together, prompts, answers and padding included."
    ] = 16384
    max_routings: Annotated[
        int, "Routings kept in memory that requests asked for, beside the models served by name."
    ] = 8
    max_body: Annotated[int, "Bytes of a request at most."] = 1 << 20
    max_connections: Annotated[int, "Connections at once."] = 1000
    read_timeout: Annotated[
        int, "Seconds in which a request must have come, its headers and its body each."
    ] = 20
    timeout: Annotated[int, "Seconds a request may take, its wait included."] = 300
    shutdown_timeout: Annotated[
        int, "Seconds that running requests are given when the server is told to stop."
    ] = 30

    def __post_init__(self) -> None:
        super().__post_init__()
        for setting in dataclasses.fields(self):
            value = getattr(self, setting.name)
            _require(value >= 1, setting.name, value, "at least 1")


@dataclass(frozen=True)
class Setting:
    """One field of a config class, as the command line and the recipes see it."""

    name: str
    type: Any
    help: str
    default: Any


def settings_of(config: type) -> tuple[Setting, ...]:
    """The settings of a config class in the order of its fields."""
    return _read_off(config)


@cache
def _read_off(config: type) -> tuple[Setting, ...]:
    hints = get_type_hints(config, include_extras=True)
    settings = []
    for item in dataclasses.fields(config):
        annotated, help_text = get_args(hints[item.name])
        settings.append(Setting(item.name, annotated, help_text, item.default))
    return tuple(settings)


def from_mapping(config: type[Config], values: Mapping[str, Any], where: str) -> Config:
    """A `config` filled from `values`; fields that `values` lacks keep their default.

    Raises ConfigError for an unknown key or a value that `config` refuses, naming `where` it stood.
    """
    known = [setting.name for setting in settings_of(config)]
    for key in values:
        if key not in known:
            raise ConfigError(f"{where}: unknown setting {key!r}; known are {', '.join(known)}.")
    try:
        return config(**values)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def _require(holds: bool, name: str, got: object, wanted: str) -> None:
    if not holds:
        raise ConfigError(f"{name} is {got!r}, but must be {wanted}.")


def _require_seed(name: str, got: int) -> None:
    _require(0 <= got < SEEDS, name, got, f"from 0 to {SEEDS - 1}")


def require_one_of(known: Sequence[str | None], name: str, got: object) -> None:
    """Raise ConfigError unless `got`, the value of `name`, is one of `known`."""
    if got not in known:
        names = ", ".join(name for name in known if name is not None)
        raise ConfigError(f"{name} is {got!r}, but must be one of {names}.")


def _typed(setting: Setting, value: Any) -> Any:
    """`value` as one of the types of `setting`. Raises ConfigError when it is of none of them."""
    kinds = get_args(setting.type) or (setting.type,)
    if isinstance(value, bool | NoneType) and type(value) in kinds:
        return value
    if not isinstance(value, bool):
        if int in kinds and isinstance(value, Integral):
            return int(value)
        if float in kinds and isinstance(value, Real):
            return _finite(setting.name, value)
        if str in kinds and isinstance(value, str):
            return value
    wanted = " or ".join(TYPE_NAMES[kind] for kind in kinds if kind in TYPE_NAMES)
    raise ConfigError(f"{setting.name} is {value!r}, but must be {wanted}.")


def _finite(name: str, value: Real) -> float:
    """`value` as a float. Raises ConfigError for infinity, NaN and what is too large."""
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    _require(math.isfinite(number), name, number, "a finite number")
    return number
