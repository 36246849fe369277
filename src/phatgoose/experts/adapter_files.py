"""An adapter's two files, a configuration and its tensors: how they are read and written.

PEFT's may say no more than can be routed, and their patterns are matched in linear time.
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import filterfalse
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import re2
import torch
from annotated_types import Ge, Le
from pydantic import BaseModel, create_model
from safetensors.torch import save_file
from torch import Tensor, nn

from ..base.identity import Base
from ..errors import ExpertError
from ..files import JsonObject, TensorFile, one_line, read_json, shortened
from ..sites import FLOATS, Tensors, is_conv1d

Item = TypeVar("Item")
ByField = Mapping[str, str]  # letters for a tensor's sizes, or how its name ends


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
    def read_config(self, directory: Path) -> JsonObject:
        """What the configuration says, checked; ExpertError for what it can't say."""

    def about(self, base: Base, layer: nn.Module) -> dict[str, object]:
        """What the configuration of a new adapter says of its base; `layer` is one of its sites."""
        return {self.base_key: base.id}

    def read_weights(self, directory: Path) -> TensorFile:
        return read_tensors(directory / self.weights, self.hint)

    def write(self, folder: Path, config: Mapping[str, object], tensors: Tensors) -> Path:
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
        tensors: Tensors,
        forms: ByField,
        endings: ByField,
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

    def read_config(self, directory: Path) -> JsonObject:
        return dict(read_json(directory / self.config, self.content))

    @cached_property
    def content(self) -> type[BaseModel]:
        types = {self.version_key: Literal[1], self.base_key: str, **self.settings}
        required: dict[str, Any] = {name: (kind, ...) for name, kind in types.items()}
        return create_model("Config", __config__={"extra": "forbid"}, **required)


# PEFT's, and what they may say: no more than can be routed.

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
PICKLED_WEIGHTS = "adapter_model.bin"
PEFT_PREFIX = "base_model.model."

# PEFT's types that are routed as they are.
EXACT = ("LORA", "IA3")

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

    prefix = PEFT_PREFIX
    hint = (
        f" Pickled weights ({PICKLED_WEIGHTS}) are never read, since they could run code: save the "
        f"adapter again as safetensors."
    )

    def read_config(self, directory: Path) -> JsonObject:
        return self.checked(self.read_any_config(directory), directory)

    def read_any_config(self, directory: Path) -> JsonObject:
        """The config of an adapter of any of PEFT's types, unchecked."""
        hint = f" Wanted a PEFT adapter, a folder with {ADAPTER_CONFIG} and {ADAPTER_WEIGHTS}."
        config = read_json(directory / ADAPTER_CONFIG, AdapterConfig, hint=hint)
        return config.model_dump(exclude_unset=True)

    def about(self, base: Base, layer: nn.Module) -> dict[str, object]:
        return {
            **super().about(base, layer),
            "revision": base.revision,
            "task_type": "SEQ_2_SEQ_LM" if base.is_encoder_decoder else "CAUSAL_LM",
            "fan_in_fan_out": is_conv1d(layer),
        }

    def checked(self, config: JsonObject, directory: Path) -> JsonObject:
        """`config`, which `directory` holds; ExpertError where it is no plain LoRA or (IA)³."""
        kind = config.get("peft_type")
        if kind not in EXACT:
            lossy = ""
            if kind in CONVERTIBLE:
                lossy = ", or 'phatgoose import --allow-loss' approximates it by a LoRA"
            raise ExpertError(
                f"{directory} holds a PEFT adapter of type {shortened(kind, 40)}; wanted LORA or "
                f"IA3{lossy}."
            )
        others = [key for key in config if config[key] and key not in (*ACTING, *HARMLESS)]
        usual = _usual(kind) if others else {}
        for key in others:
            if config[key] != usual.get(key):
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


def _usual(kind: str) -> dict[str, object]:
    """PEFT's usual options of that type."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING  # takes seconds, and few adapters need it

    return dict(vars(PEFT_TYPE_TO_CONFIG_MAPPING[kind]()))


PEFT_FILES = PeftFiles(ADAPTER_CONFIG, ADAPTER_WEIGHTS, "base_model_name_or_path")


# Untrusted regular expressions, matched in linear time. PEFT matches patterns from an adapter's
# config with Python's backtracking matcher, which a few nested repetitions can keep busy for ever.
# Google's RE2 matches here instead. Patterns that RE2 can't match, or reads differently from
# Python, are refused.

LISTS_OF_NAMES = ("target_modules", "exclude_modules", "feedforward_modules")  # or one pattern
BY_PATTERN = "_pattern"  # suffix of the options that map patterns to values
MOST_CHARACTERS = 2000  # of one pattern
MOST_NAMES = 20_000  # in a list or an object; each is tried at each layer
MOST_EXPRESSIONS = 1_000  # among them
PLAIN = re.compile(r"[\w.-]*")  # a name
# What RE2 reads differently from Python: its own classes, {,n}, flags, quoting and anchors.
READ_DIFFERENTLY = re.compile(r"\[\[:|\{,|\(\?[^:]|\\[pPCQEzZ]")

OPTIONS = re2.Options()
OPTIONS.max_mem = 2**16  # some that take more are slow to compile, or to match
OPTIONS.log_errors = False
OPTIONS.never_capture = True


def check_config(config: Mapping[str, object], where: str) -> None:
    """Raise ExpertError, naming `where`, unless all patterns and names of a PEFT `config` are
    matchable.
    """
    for key, value in config.items():
        texts = value if isinstance(value, list | dict) else [value]
        about = f"{where}: {key} holds"
        if len(texts) > MOST_NAMES:
            raise ExpertError(f"{about} {len(texts)} names; at most {MOST_NAMES} are read.")
        if key.endswith(BY_PATTERN) and isinstance(value, dict):
            _check_patterns(value, about)
        elif key in LISTS_OF_NAMES and isinstance(value, str):
            _check_patterns([value], about)
        elif key == "layers_pattern":
            for text in filterfalse(_is_name, texts):
                raise ExpertError(f"{about} {shortened(text)}, which is no name.")


def _check_patterns(patterns: Iterable[str], about: str) -> None:
    expressions = len(list(filterfalse(_is_name, patterns)))
    if expressions > MOST_EXPRESSIONS:
        raise ExpertError(
            f"{about} {expressions} regular expressions; at most {MOST_EXPRESSIONS} are read."
        )
    for pattern in patterns:
        if len(pattern) > MOST_CHARACTERS:
            raise ExpertError(
                f"{about} {shortened(pattern)}, which has {len(pattern)} characters; at most "
                f"{MOST_CHARACTERS} are read."
            )
        try:
            is_alike = not READ_DIFFERENTLY.search(pattern) and _expression(pattern)
        except (re2.error, ValueError):  # half a character is a ValueError
            is_alike = False
        if not is_alike:
            raise ExpertError(
                f"{about} {shortened(pattern)}, which is no name or regular expression that RE2 "
                f"matches as Python does."
            )


def _is_name(text: object) -> bool:
    name = str(text or "")
    return len(name) <= MOST_CHARACTERS and PLAIN.fullmatch(name) is not None


def matching(pattern: str, names: Iterable[str]) -> list[str]:
    """The `names` that `pattern` matches in full. It must have passed `check_config`."""
    return list(filter(_expression(pattern).fullmatch, names))


def value_at(patterns: Mapping[str, Item], name: str) -> Item | None:
    """The value of the first of `patterns` that matches `name` or its end after a dot, else None.

    As PEFT reads rank_pattern and alpha_pattern (`get_pattern_key`).
    """
    return next((value for pattern, value in patterns.items() if _ends(name, pattern)), None)


class ByName(dict[str, object]):
    """Values by full layer names, in place of values by pattern in a PEFT config."""

    def keys(self) -> Any:
        # PEFT tries each key as a pattern and then looks up the layer's own name: without keys it
        # finds the value at once.
        return {}.keys()


def _ends(name: str, pattern: str) -> bool:
    if PLAIN.fullmatch(pattern):  # the usual case, and much faster
        return name == pattern or name.endswith(f".{pattern}")
    return _expression(rf"(?:.*\.)?(?:{pattern})").fullmatch(name) is not None


@lru_cache(maxsize=4000)
def _expression(pattern: str) -> re2._Regexp:
    return re2.compile(pattern, OPTIONS)


# What is wrong with tensors.


def read_tensors(path: Path, hint: str = "") -> TensorFile:
    """Every tensor of a safetensors file, mapped, all finite; else ExpertError."""
    tensors = TensorFile(path, hint)
    tensors.check_finite()
    return tensors


def check_parts(
    where: str,
    forms: Mapping[str, Sequence[str | int]],
    tensors: Tensors,
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
        allowed = (others or {}).get(name, types)
        got = "missing"
        shape = dtype = None
        if tensor is not None:
            shape = tuple(tensor.shape)
            dtype = tensor.dtype
            got = f"{shape} {dtype}"
            for letter, size in zip(form, shape, strict=False):
                if not isinstance(letter, int):
                    sizes.setdefault(letter, size)
        expected = tuple(sizes.get(letter, letter) for letter in form)
        is_allowed = name in forms and dtype in allowed
        if not is_allowed or shape != expected or 0 in expected:
            want = "no such tensor"
            if form:
                want = f"({', '.join(map(str, expected))}) {' or '.join(map(str, allowed))}"
            raise ExpertError(f"{where}: {one_line(name, 200)} is {got}; wanted {want}.")
    return sizes
