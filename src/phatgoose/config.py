"""Settings, as frozen dataclasses: one place for names, defaults, help texts and limits."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from importlib import metadata
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Literal,
    TypedDict,
    TypeVar,
    get_args,
    get_origin,
    get_type_hints,
)

from annotated_types import Ge, Gt, Interval

from .errors import ConfigError

if TYPE_CHECKING:
    from pydantic import TypeAdapter

Config = TypeVar("Config", bound="Settings")

AT_LEAST_1 = Ge(1)
POSITIVE = Gt(0)
NOT_NEGATIVE = Ge(0)
RATIO = Interval(ge=0, le=1)
TAIL = Interval(ge=1, le=1 << 24)  # tokens at a prompt's end
SEED = Interval(ge=0, lt=1 << 32)  # numpy accepts no larger ones, and Trainer seeds numpy too


@dataclass(frozen=True)
class Setting:
    """One field of a config class, for the command line and the recipes."""

    name: str
    type: Any
    help: str
    default: object
    limits: tuple[object, ...] = ()

    @cached_property
    def _adapter(self) -> TypeAdapter[object]:
        from pydantic import ConfigDict, TypeAdapter  # --help does without

        kind: Any = Annotated[self.type, self.help, *self.limits]
        return TypeAdapter(kind, config=ConfigDict(allow_inf_nan=False, coerce_numbers_to_str=True))

    def checked(self, value: Any) -> Any:
        """`value` in the setting's type, also if it is a text. Raises ConfigError."""
        from pydantic import ValidationError

        try:
            return self._adapter.validate_python(value)
        except ValidationError as error:
            limits = []
            for detail in error.errors():  # such as "Input should be greater than 0"
                limits.append(f"must {detail['msg'].rpartition(' should ')[2]}")
            raise ConfigError(f"{self.name} is {value!r:.80}, but {' or '.join(limits)}.") from None


@dataclass(frozen=True)
class Settings:
    """Base of all settings: brings each value into its field's type, within its limits.

    Subclasses are frozen dataclasses whose fields are `Annotated[type, help text]`, with a limit of
    `annotated_types` as a third part if not every value will do. Other fields aren't the user's.
    """

    def __post_init__(self) -> None:
        for setting in settings_of(type(self)):
            value = setting.checked(getattr(self, setting.name))
            object.__setattr__(self, setting.name, value)


def _settings_of(config: type) -> tuple[Setting, ...]:
    hints = get_type_hints(config, include_extras=True)
    settings = []
    for field in dataclasses.fields(config):
        if get_origin(hints[field.name]) is Annotated:
            kind, text, *limits = get_args(hints[field.name])
            settings.append(Setting(field.name, kind, text, field.default, tuple(limits)))
    return tuple(settings)


# To mypy a class of `Settings` isn't hashable, as a cache wants it.
settings_of: Callable[[type], tuple[Setting, ...]] = cache(_settings_of)


def from_mapping(
    config: type[Config], values: Mapping[str, Any], where: str, others: Sequence[str] = ()
) -> Config:
    """A `config` filled from `values`; missing fields keep their default.

    `others` are allowed there too, but aren't settings. Raises ConfigError, naming `where`, for an
    unknown key or a value that `config` refuses.
    """
    names = [*(setting.name for setting in settings_of(config)), *others]
    for key in values:
        if key not in names:
            raise ConfigError(
                f"{where}: unknown setting {key!r:.80}; known are {', '.join(names) or 'none'}."
                f"{closest(key, names)}"
            )
    try:
        return config(**values)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def read_pairs(text: str, refusal: str) -> dict[str, str]:
    """The pairs of "NAME=VALUE,NAME=VALUE". Raises ConfigError, the `refusal`."""
    pairs: dict[str, str] = {}
    for part in text.split(",") if text else ():
        name, sign, value = part.partition("=")
        if not sign or name in pairs:
            raise ConfigError(refusal)
        pairs[name] = value
    return pairs


def closest(name: object, names: Iterable[str | None]) -> str:
    """A question such as " Did you mean 'arrow'?", if one of `names` is like `name`; else ""."""
    like = difflib.get_close_matches(str(name), filter(None, names), n=1)
    return f" Did you mean {like[0]!r}?" if like else ""


# The shapes of experts, one class for each kind.

ACTIVATIONS = ("relu", "gelu", "silu")
INIT_STD = 0.01  # of the initial A (lora) or D (bottleneck); B and U start at zero


@dataclass(frozen=True)
class Peft(Settings):
    """The shape of a new expert: the base of each kind's settings."""

    sites: Annotated[
        str | None,
        "Regular expression to search for in module paths. Default: every linear layer of the "
        "blocks (lora, dora), those that PEFT selects (ia3) or of the placement (bottleneck).",
    ] = dataclasses.field(default=None, kw_only=True)


@dataclass(frozen=True)
class Lora(Peft):
    """The shape of a LoRA expert: W u + (alpha / rank) B A u at every site (paper section 3)."""

    rank: Annotated[int, "Rank r of each LoRA module.", AT_LEAST_1] = 16
    alpha: Annotated[
        float | None, "Updates are scaled by alpha / rank. Default: twice the rank.", POSITIVE
    ] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha is None:
            object.__setattr__(self, "alpha", 2.0 * self.rank)


@dataclass(frozen=True)
class Dora(Lora):
    """The shape of a DoRA expert (Liu et al. 2024): a LoRA, and a magnitude for each output."""


@dataclass(frozen=True)
class IA3(Peft):
    """The shape of an (IA)³ expert (Liu et al. 2022): l ⊙ (W u + b), or W (l ⊙ u) + b."""


@dataclass(frozen=True)
class Bottleneck(Peft):
    """The shape of a bottleneck adapter: y + scale (U f(D y + b_D) + b_U) on a layer's output y."""

    placement: Annotated[
        Literal["houlsby", "pfeiffer"],
        "After attention and after the feed-forward network, or only after the latter (pfeiffer).",
    ] = "houlsby"
    size: Annotated[int, "Size of the bottleneck.", AT_LEAST_1] = 64
    activation: str = "relu"  # one of ACTIVATIONS; neither this nor the scale is a flag
    scale: float = 1.0


# How experts and gates are trained, and how examples become tokens.

FOUR_BITS = "4bit"  # a base's dtype by name: NF4 weights of bitsandbytes, computed with as "auto"
TASK_FILES = (".jsonl", ".json", ".csv", ".parquet")
EmbeddingForm = Literal["prompt", "paper"]
EMBEDDER = "sentence-transformers/all-MiniLM-L6-v2"
READER = "e5"  # the usual one of prompts (`reader.KNOWN`)


@dataclass(frozen=True)
class Training(Settings):
    """How an expert is trained. The paper's numbers (section 4.1) are in recipes/t5xl-t0.toml.

    As in the paper, the rate rises in the first 6 % of the steps and then stays, there is no weight
    decay, and gradients are clipped at a norm of 1.
    """

    steps: Annotated[int, "Optimiser steps.", AT_LEAST_1] = 1000
    batch_size: Annotated[int, "Sequences per optimiser step (paper: 1024).", AT_LEAST_1] = 32
    micro_batch_size: Annotated[int, "Sequences per forward pass, accumulated.", AT_LEAST_1] = 8
    learning_rate: Annotated[float, "AdamW learning rate (paper: 0.005).", POSITIVE] = 2e-4
    eval_every: Annotated[int, "Steps between checkpoints; the best one wins.", AT_LEAST_1] = 100
    eval_examples: Annotated[int, "Maximum validation examples, drawn by seed.", AT_LEAST_1] = 500
    seed: Annotated[int, "Seed of initialisation, data order and validation split.", SEED] = 0
    acts_on: Annotated[
        Literal["all", "answer"] | Annotated[int, TAIL],
        "What the expert acts on: all tokens, from the prompt's last one on (answer), or from the "
        "prompt's last N on (decoders).",
    ] = "all"

    @property
    def tail(self) -> int | None:
        """The number of a prompt's last tokens that the expert acts on, None for all tokens."""
        if isinstance(self.acts_on, int):
            return self.acts_on
        return 1 if self.acts_on == "answer" else None


@dataclass(frozen=True)
class GateTraining(Settings):
    """How the gates are trained (paper section 3), and which statistics other routers get.

    Batch size, schedule and seed are those of `Training` (paper section 4.1).
    """

    joint: Annotated[
        bool, "Train gates with the expert, for its steps and at its rate (paper appendix A)."
    ] = False
    gate_steps: Annotated[int, "Optimiser steps of gate training.", AT_LEAST_1] = 100
    gate_learning_rate: Annotated[
        float, "Learning rate of gate training; joint gates have the expert's.", POSITIVE
    ] = 5e-3  # the paper's: gates begin at zero, and have few steps
    statistics_examples: Annotated[int, "Examples for the statistics below.", AT_LEAST_1] = 1000
    means: Annotated[bool, "Compute mean activations (for router average-activation)."] = True
    readings: Annotated[bool, "Compute prompt statistics (for router discriminant)."] = True
    reader: Annotated[
        str, "Who reads prompts for their statistics: minilm, smollm2, …, or MODEL:FIRST-LAST."
    ] = READER
    embeddings: Annotated[
        bool, "Embed training inputs (for routers retrieval and centroid; extra 'retrieval')."
    ] = False
    embedder: Annotated[str, "Sentence embedder: a Hub id or a local folder."] = EMBEDDER
    embedding_form: Annotated[
        EmbeddingForm, "What is embedded: the prompt, or answer choices and input (paper)."
    ] = "prompt"


@dataclass(frozen=True)
class Cutting(Settings):
    """How many tokens of a text are read."""

    max_input_tokens: Annotated[int, "Inputs with more tokens are cut.", AT_LEAST_1] = 512
    truncation: Annotated[
        Literal["middle", "left", "right"],
        "Which part of a long input to cut: the middle (three times as much stays after the cut as "
        "before), left, or right (as in the paper).",
    ] = "middle"
    max_target_tokens: Annotated[int, "Targets with more are cut, on the right.", AT_LEAST_1] = 512


@dataclass(frozen=True)
class Formatting(Cutting):
    """How an example becomes tokens."""

    chat: Annotated[bool, "Wrap inputs in the base model's chat template."] = False


@dataclass(frozen=True)
class PromptFormatting(Cutting):
    """How a prompt that someone types becomes tokens; `generation.form_for` decides on a chat."""

    chat: Annotated[
        bool | None,
        "Wrap the prompt in the base model's chat template; default: as the experts' training "
        "inputs were, or if nothing is recorded, where the base has one.",
    ] = None


@dataclass(frozen=True)
class ScoringSettings(Settings):
    """How tasks are scored.

    Attributes:
        formatting: How inputs are cut and wrapped.
        limit: Maximum examples of each task, drawn by `seed`; None is all of them.
        seed: Seed of the draw: the same one draws the same examples.
        max_new_tokens: Maximum tokens of a generated answer, where a task sets none.
        token_budget: Maximum tokens of a batch.
    """

    formatting: Formatting = dataclasses.field(default_factory=Formatting)
    limit: Annotated[int | None, "Maximum examples per task.", AT_LEAST_1] = None
    seed: int = 0
    max_new_tokens: Annotated[int, "Maximum new tokens if the task sets none.", AT_LEAST_1] = 64
    token_budget: int = 4096


# How a routed model chooses experts.

KERNEL_POINTS = "phatgoose.kernels"  # the entry points of other packages' kernels
if TYPE_CHECKING:
    Kernel = str
else:
    OUTSIDE = sorted(metadata.entry_points(group=KERNEL_POINTS).names)
    Kernel = Literal["auto", "reference", "concat", "gather", "grouped", "native", *OUTSIDE]


@dataclass(frozen=True)
class Routing(Settings):
    """How a routed model chooses experts (paper sections 3 and 4.2).

    `router` is a router's name, and its own settings after a colon: "arrow:form=peft". Each
    router's settings are the fields of its class (`routing.routers`).
    """

    router: Annotated[
        str,
        "NAME or NAME:SETTING=VALUE,… ('phatgoose routers'); auto: the first that experts allow.",
    ] = "auto"
    k: Annotated[
        int | None,
        "Experts per token at each layer, or per prompt; default: the router's own number.",
        AT_LEAST_1,
    ] = None
    kernel: Annotated[Kernel, "How the experts' updates are computed; auto: the fastest."] = "auto"
    embedder: Annotated[str | None, "Embedder of routers that use one; default: its usual."] = None
    reader: Annotated[str | None, "Reader of routers that use one; default: the recorded."] = None
    reader_device: Annotated[str, "Where the reader computes."] = "cpu"

    @property
    def name(self) -> str:
        return self.router.partition(":")[0]

    @property
    def of_any_model(self) -> Routing:
        """The settings that a model with a routing of its own may be given too."""
        return Routing(embedder=self.embedder, reader=self.reader, reader_device=self.reader_device)


class RoutingSettings(TypedDict, total=False):
    """The fields of `Routing` as keywords, for editors and type checkers."""

    router: str
    k: int | None
    kernel: Kernel
    embedder: str | None
    reader: str | None
    reader_device: str


# A saved model has its own routing; only its embedder and reader can be named again.
POOL_SETTINGS = frozenset({"router", "k", "kernel"})

MODEL_TYPE = "phatgoose"  # in the config.json of a saved routed model, as transformers has it


# The limits of a server.


@dataclass(frozen=True)
class Serving(Settings):
    """The limits of `phatgoose serve` (docs/serving.md)."""

    max_tokens: Annotated[int, "Maximum tokens to generate for one answer.", AT_LEAST_1] = 1024
    max_queue: Annotated[int, "Maximum answers that wait; others are refused.", AT_LEAST_1] = 256
    max_batch_tokens: Annotated[
        int, "Maximum tokens to compute together, padding included.", AT_LEAST_1
    ] = 16384
    prefix_cache: Annotated[
        int, "MiB of keys and values to keep for prompts with one beginning; 0: none.", NOT_NEGATIVE
    ] = 256
    reads: Annotated[
        Literal["conversation", "last-message"],
        "What routers by prompt read of a chat: the conversation, where a follow-up goes on with "
        "what answered before, or the last message alone.",
    ] = "conversation"
    watch: Annotated[bool, "Open models again when their folder has changed."] = False
    learn: Annotated[
        bool,
        "Take corrections (POST /v1/route/corrections), which stay in the pool's folder, and watch "
        "it.",
    ] = False
    shadow: Annotated[
        bool,
        "Answer as requests ask, by the base where they name no expert, and tell in a header, the "
        "log and metrics what would have been chosen.",
    ] = False
    strict: Annotated[bool, "With --upstream, refuse fields that would be forwarded."] = False
    timeout: Annotated[int, "Maximum seconds per request, waiting included.", AT_LEAST_1] = 300
    max_connections: int = 1000
    shutdown_timeout: int = 30  # seconds for running requests to finish after a signal to stop
