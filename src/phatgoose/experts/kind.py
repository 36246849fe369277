"""What every kind of expert has: modules at its sites, files, new modules, and a stack.

Glossary: u input of a site's linear layer [.., n], y its output [.., d], W and b its weight and
bias, σ the strength at which a module acts (1, or [.., 1] for each token): at 1 as it was trained,
at 0 not at all. E experts of a stack, T tokens, k experts chosen for each token.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

import torch
from annotated_types import Ge, Le
from peft import IA3Config, LoraConfig, PeftConfig
from pydantic import BaseModel, create_model
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..base.identity import Base
from ..errors import ExpertError
from ..files import TensorFile, check_config, one_line, read_json, shortened
from ..sites import FLOATS, Site, WrappedLinear, dtype_at, find_sites, replaced
from ..tasks.batching import where_active

VERSION = 1  # of the formats of one's own

# One expert: its module at a site, and its files.


class SiteModule(ABC):
    """What an expert does at one site. Each kind has a frozen dataclass of this base.

    Its fields are tensors, then settings. `parts` has a letter for each size of a tensor, which
    stands for one number at a site: {"down": "md"}. In `files` a tensor is called SITE.FIELD,
    unless `endings` has another ending. For a kind with files of its own (`OwnFiles`) everything
    but `at` and `apply` follows.
    """

    kind: ClassVar[str]
    files: ClassVar[AdapterFiles]
    parts: ClassVar[Mapping[str, str]]
    endings: ClassVar[Mapping[str, str]] = {}

    @property
    def sizes(self) -> Mapping[str, int]:
        """What the letters of `parts` stand for."""
        sizes: dict[str, int] = {}
        for name, letters in self.parts.items():
            tensor = getattr(self, name)
            if tensor is not None:
                sizes.update(zip(letters, tensor.shape, strict=True))
        return sizes

    @property
    def size(self) -> int | None:
        """The rank, or the size of the bottleneck; None for a kind that has neither."""
        return next((size for letter, size in self.sizes.items() if letter not in "nd"), None)

    @property
    def settings(self) -> tuple[object, ...]:
        """Its fields that are no tensors."""
        return tuple(value for value in vars(self).values() if not isinstance(value, Tensor | None))

    @abstractmethod
    def at(self, weight: Tensor) -> SiteModule:
        """The same module on the device of `weight`, ready for `apply`."""

    @abstractmethod
    def apply(self, base: nn.Module, u: Tensor, strength: Tensor | float = 1.0) -> Tensor:
        """The output [.., d] of the layer `base` for u under this module, which came from `at`."""

    @classmethod
    def read(
        cls, directory: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> Mapping[str, SiteModule]:
        """The modules by site of an adapter whose `files` were read; `directory` is for messages.

        Raises ExpertError when a tensor is missing or left over, or shapes don't fit each other.
        """
        settings = {name: config[name] for name in cls.files.settings}
        by_site = cls.files.by_site(directory, tensors, cls.parts, cls.endings)
        return {site: cls(**parts, **settings) for site, parts in by_site.items()}

    @classmethod
    def write(cls, folder: Path, modules: Mapping[str, Self], about: Mapping[str, object]) -> Path:
        """`folder`, with these modules by site in its `files`; `about` goes into the config.

        Settings are those of the first module: all modules of an expert share them.
        """
        tensors = {}
        for site, module in modules.items():
            for name in cls.parts:
                tensors[site + cls.endings.get(name, f".{name}")] = getattr(module, name)
        first = next(iter(modules.values()))
        settings = {name: getattr(first, name) for name in cls.files.settings}
        config = {cls.files.version_key: VERSION, **about, **settings}
        return cls.files.write(folder, config, tensors)


@dataclass(frozen=True)
class AdapterFiles(ABC):
    """The two files of an adapter by name; the configuration names the base under `base_key`.

    `settings` and `version_key` are those of `OwnFiles`.
    """

    config: str
    weights: str
    base_key: str = "base"
    settings: Mapping[str, object] = field(default_factory=dict, hash=False, kw_only=True)
    version_key: str = field(default="version", kw_only=True)
    prefix: ClassVar[str] = ""  # of tensors' names
    hint: ClassVar[str] = ""  # if there are no weights

    @abstractmethod
    def read_config(self, directory: Path) -> dict[str, Any]:
        """What the configuration says, checked; ExpertError for what it can't say."""

    def about(self, base: Base, layer: nn.Module) -> dict[str, object]:
        """What the configuration of a new adapter says of its base; `layer` is one of its sites."""
        return {self.base_key: base.id}

    def read_weights(self, directory: Path) -> TensorFile:
        return read_tensors(directory / self.weights, self.hint)

    def write(
        self, folder: Path, config: Mapping[str, object], tensors: Mapping[str, Tensor]
    ) -> Path:
        """`folder`, with both in it; `tensors` are by site and ending."""
        prefixed = {}
        for name, tensor in tensors.items():
            prefixed[self.prefix + name] = tensor.detach().cpu().contiguous()
        save_file(prefixed, folder / self.weights)
        (folder / self.config).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        return folder

    def by_site(
        self,
        directory: Path,
        tensors: Mapping[str, Tensor],
        forms: Mapping[str, str],
        endings: Mapping[str, str],
    ) -> dict[str, dict[str, Tensor]]:
        """The weights by site and field, told by their names' endings, of these `forms`."""
        by_site: dict[str, dict[str, Tensor]] = {}
        ends = {endings.get(name, f".{name}"): name for name in {**forms, **endings}}
        for key in sorted(tensors):
            end = next(filter(key.endswith, ends), "")
            site = key.removeprefix(self.prefix).removesuffix(end)
            name = ends.get(end, key) if key.startswith(self.prefix) else key
            by_site.setdefault(site, {})[name] = tensors[key]
        for site, parts in (by_site or {"": {}}).items():
            check_parts(f"{directory}, site {site}", forms, parts)
        return by_site


@dataclass(frozen=True)
class OwnFiles(AdapterFiles):
    """A format of one's own: a JSON file and a safetensors file.

    The configuration has a version, the base's id, and each of `settings`, which are types as
    pydantic reads them; all modules of an expert share them.
    """

    def read_config(self, directory: Path) -> dict[str, Any]:
        return dict(read_json(directory / self.config, self.content))

    @cached_property
    def content(self) -> type[BaseModel]:
        types = {self.version_key: Literal[1], self.base_key: str, **self.settings}
        required: dict[str, Any] = {name: (kind, ...) for name, kind in types.items()}
        return create_model("Config", __config__={"extra": "forbid"}, **required)


# PEFT's.

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
PICKLED_WEIGHTS = "adapter_model.bin"
PEFT_PREFIX = "base_model.model."

# PEFT's types that are routed as they are.
CONFIGS: dict[str, type[PeftConfig]] = {"LORA": LoraConfig, "IA3": IA3Config}

# PEFT's types that update linear layers, so that its convert_to_lora can approximate them.
CONVERTIBLE = (
    "LOHA",
    "LOKR",
    "VERA",
    "FOURIERFT",
    "RANDLORA",
    "C3A",
    "WAVEFT",
    "DELORA",
    "GRALORA",
)

# The options that decide where an adapter acts and how strongly.
ACTING = (
    "target_modules",
    "exclude_modules",
    "feedforward_modules",
    "fan_in_fan_out",
    "task_type",
    "layers_to_transform",
    "layers_pattern",
    "r",
    "lora_alpha",
    "use_rslora",
    "lora_bias",
    "rank_pattern",
    "alpha_pattern",
)
# Others that change nothing of a trained adapter. Whatever else is set makes it more than
# W u + s B A u or (IA)³ vectors, or may do so in a newer PEFT.
HARMLESS = (
    "peft_type",
    "auto_mapping",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "peft_version",
    "lora_dropout",
    "init_lora_weights",
    "init_ia3_weights",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "qalora_group_size",
    "megatron_core",
)
PLAIN_INITS = ("true", "false", "none", "gaussian", "orthogonal", "eva", "mica")

Number = Annotated[float, Ge(-1e9), Le(1e9)]


class AdapterConfig(BaseModel, extra="allow"):
    """What is read of an adapter_config.json, beside what PEFT itself reads."""

    peft_type: str | None = None
    revision: str | None = None
    lora_alpha: Number = 8
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, Number] | None = None


class PeftFiles(AdapterFiles):
    """PEFT's files of a plain LoRA or (IA)³. Others, and pickled ones, are refused."""

    prefix: ClassVar[str] = PEFT_PREFIX
    hint: ClassVar[str] = (
        f" Pickled weights ({PICKLED_WEIGHTS}) are never read, since they could run code: save the "
        f"adapter again as safetensors."
    )

    def read_config(self, directory: Path) -> dict[str, Any]:
        return self.checked(self.read_any_config(directory), directory)

    def read_any_config(self, directory: Path) -> dict[str, Any]:
        """The config of an adapter of any of PEFT's types, unchecked."""
        hint = f" Wanted a PEFT adapter, a folder with {ADAPTER_CONFIG} and {ADAPTER_WEIGHTS}."
        config = read_json(directory / ADAPTER_CONFIG, AdapterConfig, hint=hint)
        return config.model_dump(exclude_unset=True)

    def about(self, base: Base, layer: nn.Module) -> dict[str, object]:
        return {
            **super().about(base, layer),
            "revision": base.revision,
            "task_type": "SEQ_2_SEQ_LM" if base.is_encoder_decoder else "CAUSAL_LM",
            "fan_in_fan_out": isinstance(layer, Conv1D),
        }

    def checked(self, config: dict[str, Any], directory: Path) -> dict[str, Any]:
        """`config`, which `directory` holds; ExpertError where it is no plain LoRA or (IA)³."""
        kind = config.get("peft_type")
        if kind not in CONFIGS:
            lossy = ""
            if kind in CONVERTIBLE:
                lossy = ", or 'phatgoose import --allow-loss' approximates it by a LoRA"
            raise ExpertError(
                f"{directory} holds a PEFT adapter of type {shortened(kind, 40)}; wanted LORA or "
                f"IA3{lossy}."
            )
        usual = vars(CONFIGS[kind]())
        for key, value in config.items():
            is_set = value and value != usual.get(key)
            if is_set and key not in (*ACTING, *HARMLESS):
                raise ExpertError(
                    f"{directory} uses {shortened(key)}, which can't be routed: only updates of "
                    f"linear layers at all tokens can (docs/imports.md)."
                )
        init = str(config.get("init_lora_weights", True)).lower()
        if init not in PLAIN_INITS:
            raise ExpertError(
                f"{directory} was initialised by {shortened(init, 40)}, which may have changed the "
                f"base; convert it with PEFT's path_initial_model_for_weight_conversion first."
            )
        check_config(config, str(directory / ADAPTER_CONFIG))
        return config


PEFT_FILES = PeftFiles(ADAPTER_CONFIG, ADAPTER_WEIGHTS, "base_model_name_or_path")


# What is wrong with tensors.


def read_tensors(path: Path, hint: str = "") -> TensorFile:
    """Every tensor of a safetensors file, mapped, all finite; else ExpertError."""
    tensors = TensorFile(path, hint)
    tensors.check_finite()
    return tensors


def check_parts(
    where: str,
    forms: Mapping[str, Sequence[str | int]],
    tensors: Mapping[str, Any],
    types: tuple[torch.dtype, ...] = FLOATS,
    others: Mapping[str, tuple[torch.dtype, ...]] | None = None,
) -> dict[str | int, int]:
    """The sizes by letter of `tensors`; ExpertError unless they are those of `forms` and fit.

    A form has a letter for each size, or the size itself. `types` are allowed, but for `others`.
    """
    sizes: dict[str | int, int] = {}
    for name in dict.fromkeys((*tensors, *forms)):
        tensor = tensors.get(name)
        form = forms.get(name, ())
        allowed = others.get(name, types) if others else types
        shape = () if tensor is None else tuple(tensor.shape)
        expected = tuple(
            letter if isinstance(letter, int) else sizes.setdefault(letter, size)
            for letter, size in zip(form, shape, strict=False)
        )
        is_allowed = tensor is not None and name in forms and tensor.dtype in allowed
        fits = shape == expected and len(shape) == len(form) and 0 not in shape
        if not (is_allowed and fits):
            got = "missing" if tensor is None else f"{shape} {tensor.dtype}"
            want = "no such tensor"
            if form:
                numbers = ", ".join(str(sizes.get(letter, letter)) for letter in form)
                want = f"({numbers}) {' or '.join(map(str, allowed))}"
            raise ExpertError(f"{where}: {one_line(name, 200)} is {got}; wanted {want}.")
    return sizes


def check_fit(
    name: str,
    modules: Mapping[str, SiteModule],
    sites: Mapping[str, Site],
    *vectors: Mapping[str, Tensor],
) -> None:
    """Raise ExpertError unless expert `name` fits a base with these `sites`.

    `vectors` are its gates and means, if any: only the base knows how long those are whose module
    doesn't see the site's input.
    """
    for site, module in modules.items():
        at = sites.get(site)
        n = d = 0
        base = "has no such layer"
        if at:
            n = at.in_features
            d = at.out_features
            base = f"{n} to {d}"
        inputs = module.sizes.get("n", n)
        outputs = module.sizes.get("d", d)
        lengths = {len(by_site[site]) for by_site in vectors if site in by_site}
        fits = at and (inputs, outputs) == (n, d) and lengths <= {n}
        if not fits:
            more = f", with gates or means of {sorted(lengths)} numbers" if lengths else ""
            raise ExpertError(
                f"Expert {name!r}, site {site}: maps {inputs} to {outputs} features{more}, the "
                f"base model {base}; it was trained on another base."
            )


# One expert alone on its base: a layer with its module at each of its sites.


class ModifiedLinear(WrappedLinear):
    """A linear layer with one expert's module, behind a gate v that starts at zeros if `gated`.

    A LoRA's output is then `W u + scale * B A u * sigmoid(v . u)`, without a bias in the sigmoid
    (paper section 3). A module of another kind acts at the strength of the sigmoid.
    """

    gate: nn.Parameter  # None unless `gated`

    def __init__(
        self, base: nn.Module, module: SiteModule, dtype: torch.dtype, *, gated: bool
    ) -> None:
        super().__init__(base)
        device = self.weight.device
        self.module = module.at(torch.empty(0, dtype=dtype, device=device))
        self.register_parameter("gate", new_gate(self.in_features, device) if gated else None)

    def forward(self, u: Tensor) -> Tensor:
        return self.module.apply(self.base, u, strength_at(u, self.gate))


@contextmanager
def applied(
    model: PreTrainedModel, modules: Mapping[str, SiteModule], *, gated: bool = False
) -> Iterator[dict[str, ModifiedLinear]]:
    """`model` with an expert's modules by site, `gated` or not; ExpertError if one doesn't fit."""
    check_fit("adapter", modules, find_sites(model))
    layers = {}
    for site, module in modules.items():
        layer = model.get_submodule(site)
        layers[site] = ModifiedLinear(layer, module, dtype_at(layer, model), gated=gated)
    with replaced(model, layers):
        yield layers


# A new expert, about to be trained: a base with new modules at its sites.
#
# All start as the identity. Only parameters of the expert (and of its gates, in joint training)
# have gradients. They are float32 master copies, cast in the forward pass, so that nothing of the
# base path is upcast.


def new_gate(in_features: int, device: torch.device) -> nn.Parameter:
    return nn.Parameter(torch.zeros(in_features, device=device))


def strength_at(u: Tensor, v: Tensor | None) -> Tensor | float:
    """The strength σ at each token of u [.., n]: how far its gate v [n], if any, is open.

    That is `sigmoid(v . u)`, [.., 1]; 0 at tokens that the expert doesn't act on.
    """
    if v is None:
        return where_active(1.0, u)
    opened = (u @ v.to(u.dtype)).float().sigmoid().to(u.dtype)
    return where_active(opened.unsqueeze(-1), u)


@dataclass(frozen=True)
class FreshExpert:
    """An expert in training: `model` is trained, then `save` writes its files to a folder.

    `parts` are what is trained, by site, with the joint gates.
    """

    model: nn.Module
    parts: Mapping[str, Trained]
    save: Callable[[Path], None]


class Trained(nn.ParameterDict):
    """A module's parameters by name, float32; `gate` is its joint gate, if it has one."""

    gate: nn.Parameter

    def __init__(self, parameters: Mapping[str, Tensor], gate: nn.Parameter | None) -> None:
        super().__init__()
        for name, tensor in parameters.items():  # by item: it would sort a dictionary
            self[name] = nn.Parameter(tensor)
        self.register_parameter("gate", gate)

    @property
    def weight(self) -> nn.Parameter:
        """The first of them."""
        first: nn.Parameter = next(iter(self.values()))
        return first


class NewModules(ABC):
    """How new modules of one kind are made and trained.

    They are stored in the type of each one's layer (`dtype_at`), but for the parameters that are
    named as `exact`, which stay float32. In training their strength passes `where_active`, so that
    an expert can act from its prompts' end on. `on_packed` says that they can be trained on
    quantised weights.
    """

    exact: ClassVar[tuple[str, ...]] = ()
    on_packed: ClassVar[bool] = True

    def default_sites(self, model: PreTrainedModel, settings: Any) -> str | None:
        """The pattern of sites for settings that name none; None for all sites."""
        return None

    @abstractmethod
    def initial(
        self, model: PreTrainedModel, settings: Any, sites: Mapping[str, Site]
    ) -> Mapping[str, Mapping[str, Tensor]]:
        """The parameters at the start by site and name, float32, drawn on the CPU if at random."""

    @abstractmethod
    def module(
        self, settings: Any, parameters: Mapping[str, Tensor], layer: nn.Module
    ) -> SiteModule:
        """The module that these parameters make on the base's linear `layer`."""

    def count(self, model: PreTrainedModel, settings: Any, sites: Mapping[str, Site]) -> int:
        """The number of trained parameters at `sites`, without gates."""
        with torch.device("meta"):
            initial = self.initial(model, settings, sites)
        count = 0
        for parameters in initial.values():
            count += sum(tensor.numel() for tensor in parameters.values())
        return count

    @contextmanager
    def create(
        self, base: Base, settings: Any, sites: Mapping[str, Site], *, joint: bool
    ) -> Iterator[FreshExpert]:
        """A context in which `base` has new modules at `sites`, behind gates if `joint`."""
        model = base.model.requires_grad_(False)
        layers = {}
        trained = {}
        for site, parameters in self.initial(model, settings, sites).items():
            layer = _NewLayer(model.get_submodule(site), self, settings, parameters, joint=joint)
            layers[site] = layer
            trained[site] = layer.trained

        def save(folder: Path) -> None:
            modules = {}
            for site, layer in layers.items():
                modules[site] = layer.module(dtype_at(layer.base, model))
            site, first = next(iter(modules.items()))
            first.write(folder, modules, first.files.about(base, layers[site].base))

        with replaced(model, layers):
            yield FreshExpert(model, trained, save)


class _NewLayer(WrappedLinear):
    """A linear layer with a module in training, behind a joint gate if `joint`."""

    def __init__(
        self,
        base: nn.Module,
        new: NewModules,
        settings: Any,
        parameters: Mapping[str, Tensor],
        *,
        joint: bool,
    ) -> None:
        super().__init__(base)
        self.new = new
        self.settings = settings
        device = self.weight.device
        moved = {name: tensor.to(device) for name, tensor in parameters.items()}
        self.trained = Trained(moved, new_gate(self.in_features, device) if joint else None)

    def module(self, dtype: torch.dtype) -> SiteModule:
        parameters = {}
        for name, parameter in self.trained.items():
            parameters[name] = parameter if name in self.new.exact else parameter.to(dtype)
        return self.new.module(self.settings, parameters, self.base)

    def forward(self, u: Tensor) -> Tensor:
        module = self.module(u.dtype).at(u)
        return module.apply(self.base, u, strength_at(u, self.trained.gate))


# Many experts at one site, stacked: one row an expert.

INDICES = (torch.int64,)
Stack = TypeVar("Stack", bound="Part")
Product = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Stacked:
    """A tensor of a part: its sizes after the number of experts, and its type.

    `sizes` has a letter for each: n for the site's inputs, d for its outputs; zeros fill up a first
    size of another letter where experts differ. `dtype` is "model" (that of the model), "float32"
    or "index" (int64). An `optional` one may be None, which means zeros.
    """

    sizes: str
    dtype: str = "model"
    optional: bool = False

    @property
    def types(self) -> tuple[torch.dtype, ...]:
        if self.dtype == "index":
            return INDICES
        return (torch.float32,) if self.dtype == "float32" else FLOATS

    @property
    def is_filled_up(self) -> bool:
        return self.sizes[:1] not in ("", "n", "d")


def stacked(sizes: str, dtype: str = "model", *, optional: bool = False) -> Any:
    """A field of a `Part`: a tensor [experts, *sizes] (see `Stacked`)."""
    default: Any = None if optional else MISSING
    return field(default=default, metadata={"form": Stacked(sizes, dtype, optional)})


@dataclass(frozen=True)
class Constant:
    """What experts come to at constant weights; what they don't have is None.

    W u + b becomes `output_factor` ⊙ (W (u ⊙ `input_factor`) + b) + B A u + `bias`.
    """

    A: Any = None  # [r, n]
    B: Any = None  # [d, r]
    bias: Tensor | None = None  # [d]
    input_factor: Tensor | None = None  # [n]
    output_factor: Tensor | None = None  # [d]


@dataclass(frozen=True, kw_only=True)
class Part(ABC):
    """Some experts' modules at one site, stacked: a frozen dataclass of `stacked` tensors.

    `rows` are the experts' rows in the whole stack, None if these are all. `compared` names the
    fields that an expert's update is made of, one vector [E, d] or two factors [E, r, n] and
    [E, r, d] that are multiplied: by these, updates are measured and compared. A kind without them
    is refused where that is asked for, and so is one without `constant` where it is exported.
    `prefix` begins the tensors' names in saved models, None for the part's name.
    """

    name: ClassVar[str]
    prefix: ClassVar[str | None] = None
    compared: ClassVar[tuple[str, ...]] = ()

    rows: Tensor | None = stacked("", "index", optional=True)

    @classmethod
    def stacks(cls, module: Any) -> bool:
        """True for a module of the kind that belongs into this part."""
        return True

    @classmethod
    def row(cls, module: Any) -> Mapping[str, Tensor | None]:
        """A module's tensors by field, as they are stacked; by default its own of these names."""
        return {name: getattr(module, name) for name in cls.forms() if name != "rows"}

    @classmethod
    def of(
        cls: type[Stack],
        rows: Mapping[int, Mapping[str, Tensor | None]],
        dtype: torch.dtype,
        device: torch.device,
        total: int,
    ) -> Stack:
        """The stack of what `row` gives, by their rows in the whole stack, which has `total`."""
        tensors = {}
        for name, form in cls.forms().items():
            parts = [row.get(name) for row in rows.values()]
            like = next((part for part in parts if part is not None), None)
            if like is None:
                continue
            zeros = torch.zeros_like(like)
            filled = [zeros if part is None else part for part in parts]
            if form.is_filled_up:
                width = max(map(len, filled))
                filled = [widened(part[None], width)[0] for part in filled]
            exact = dtype if form.dtype == "model" else form.types[0]
            tensors[name] = torch.stack(filled).to(device, exact)
        if len(rows) < total:
            tensors["rows"] = torch.tensor(list(rows), device=device)
        return cls(**tensors)

    @classmethod
    def forms(cls) -> Mapping[str, Stacked]:
        """What its tensors look like, by field."""
        return {each.name: each.metadata["form"] for each in fields(cls)}

    @classmethod
    def names(cls) -> Mapping[str, str]:
        """The tensors' names in saved models, by field: no two kinds' are the same."""
        prefix = f"{cls.name}_" if cls.prefix is None else cls.prefix
        names = {each.name: f"{prefix}{each.name}" for each in fields(cls)}
        return names | {"rows": f"{cls.name}_rows"}

    # How it acts: `experts` [T, k] are rows of this part, `weights` [T, k] theirs, 0 for others'.

    def input_factor(self, experts: Tensor, weights: Tensor) -> Tensor | None:
        """What multiplies the inputs, float32 [T, n]; None for nothing."""
        return None

    def output_factor(self, experts: Tensor, weights: Tensor) -> Tensor | None:
        """What multiplies the outputs of the base's layer, float32 [T, d]; None for nothing."""
        return None

    def added(
        self, u: Tensor, y: Tensor, experts: Tensor, weights: Tensor, product: Product
    ) -> Tensor | None:
        """What is added for inputs u [T, n] and the base's outputs y [T, d], [T, d]; or None.

        `product(u, experts, weights, A, B)` is the sum over z of w_z B_z A_z u, [T, d], for stacked
        factors A [E, r, n] and B [E, r, d] of this part's E experts, of one type with u.
        """
        return None

    def constant(self, weights: Tensor) -> Constant | None:
        """What it comes to at constant weights [E]; None if it can't be said so."""
        return None

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are there, by their names in saved models."""
        named = {name: getattr(self, field) for field, name in self.names().items()}
        return {name: tensor for name, tensor in named.items() if tensor is not None}


def widened(tensor: Tensor, width: int) -> Tensor:
    """A tensor [E, r, ..] with zeros up to `width` in its second dimension."""
    missing = width - tensor.shape[1]
    if not missing:
        return tensor
    later = [0, 0] * (tensor.dim() - 2)  # dimensions, which come first and stay
    return functional.pad(tensor, [*later, 0, missing])


def scaled(tensor: Tensor, scale: float) -> Tensor:
    """`tensor`, or in float32 its product with a `scale` other than 1."""
    return tensor if scale == 1 else scale * tensor.float()


def factor_of(weights: Tensor, deltas: Tensor) -> Tensor | None:
    """1 + Σ w_z deltas_z at constant weights [E]; None where that is 1."""
    change = (weights.float()[:, None] * deltas).sum(dim=0)
    if not bool(change.any()):
        return None
    return 1 + change


# Sums over the experts that each token chose, which kernels and stacks share.


def dense_weights(experts: Tensor, weights: Tensor, count: int) -> Tensor:
    """The weights [T, k] of the chosen `experts` [T, k] as weights of all, [T, count]."""
    return weights.new_zeros(len(experts), count).scatter_add(1, experts, weights)


def weighted_rows(experts: Tensor, weights: Tensor, rows: Tensor) -> Tensor:
    """Sum over the chosen z [T, k] of w_z rows_z, float32 [T, d], for `rows` [E, d]."""
    # One operation, which keeps no [T, k, d] of each token's rows.
    return functional.embedding_bag(
        experts, rows.float(), per_sample_weights=weights.float(), mode="sum"
    )


def is_one_call(*factors: Tensor) -> bool:
    """True where torch has the products for factors [E, n, m]: bfloat16, n and m multiples of 8."""
    if not hasattr(functional, "grouped_mm"):
        return False
    for factor in factors:
        _, n, m = factor.shape
        is_aligned = n % 8 == 0 and m % 8 == 0
        if factor.dtype is not torch.bfloat16 or not is_aligned:
            return False
    return True


def expert_products(rows: Tensor, factors: Tensor, counts: Tensor) -> Tensor:
    """The first counts[0] of `rows` [.., n] times factors[0] [n, m], the next times the next."""
    if is_one_call(factors):
        return functional.grouped_mm(rows, factors, offs=counts.cumsum(0).to(torch.int32))
    # Counts are read back, which waits for a GPU.
    parts = torch.split(rows, counts.tolist())
    return torch.cat([part @ factor for part, factor in zip(parts, factors, strict=True)])
