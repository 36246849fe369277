"""Where a LoRA or (IA)³ config acts on a base: PEFT's own answer, from a model without weights.

PEFT resolves target_modules (names, regular expressions, all-linear), layers_to_transform,
exclude_modules, rank_pattern, alpha_pattern and rsLoRA. Only regular expressions are matched here
beforehand, without backtracking (`files.check_patterns`), and PEFT is given the names that match.
The model is built on torch's meta device, once per distinct config.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from peft import PeftModel, get_peft_model
from peft.tuners.ia3 import IA3Layer
from peft.tuners.lora import LoraLayer
from peft.utils.transformers_weight_conversion import (
    convert_peft_adapter_state_dict_for_transformers,
)
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..base import load_skeleton
from ..errors import ExpertError
from ..files import BY_PATTERN, LISTS_OF_NAMES, ByName, first_line, matching, shortened, value_at
from ..sites import Site, find_sites
from . import ia3, lora
from .kind import SiteModule
from .peft_files import ACTING, ADAPTER, CONFIGS, PEFT_PREFIX

ALL_LINEAR = "all-linear"  # a word of PEFT's, no pattern
UNINITIALISED = {"LORA": {"init_lora_weights": False}, "IA3": {"init_ia3_weights": False}}


@dataclass(frozen=True)
class Target:
    """A linear layer that a config adapts: the shapes of its tensors by field, a LoRA's scale."""

    shapes: Mapping[str, tuple[int, ...]]
    scale: float | None = None

    def module(self, site: str, tensors: dict[str, Tensor]) -> SiteModule:
        """The module of the tensors for `site`, which are taken out; ExpertError for others."""
        endings = ia3.ENDINGS if self.scale is None else lora.ENDINGS
        parts = {}
        for name in self.shapes:
            if f"{PEFT_PREFIX}{site}{endings[name]}" in tensors:
                parts[name] = tensors.pop(f"{PEFT_PREFIX}{site}{endings[name]}")
        got = {name: tuple(part.shape) for name, part in parts.items()}
        if got != self.shapes:
            raise ExpertError(f"Site {site}: its config wants {self.shapes}, got {got}.")
        if self.scale is None:
            vector = parts["vector"]
            return ia3.ScalingVector(vector.flatten(), on_input=vector.shape[0] == 1)
        return lora.LoraFactors(**parts, scale=self.scale)


@dataclass(frozen=True)
class Skeleton:
    """A base under a config, without weights: `targets` by site, in the model's order."""

    model: PeftModel
    targets: Mapping[str, Target]

    def rename(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`tensors` under this transformers' names of the layers; ExpertError if PEFT can't."""
        with peft_errors("Its tensors can't be converted to this transformers"):
            return dict(
                convert_peft_adapter_state_dict_for_transformers(
                    model=self.model,
                    peft_config=self.model.peft_config[ADAPTER],
                    adapter_state_dict=dict(tensors),
                    adapter_name=ADAPTER,
                )
            )


def resolve(base: str, config: Mapping[str, Any], revision: str | None = None) -> Skeleton:
    """The base `base` under a plain `config` (as `PEFT_FILES` reads it), without weights.

    Raises BaseModelError without the base's config, ExpertError when `config` doesn't fit it.
    """
    options = {key: config[key] for key in ACTING if config.get(key) is not None}
    return _resolve(base, revision, config["peft_type"], json.dumps(options))


@lru_cache(maxsize=8)
def _resolve(base: str, revision: str | None, kind: str, options: str) -> Skeleton:
    model = load_skeleton(base, revision=revision, offline=False)
    sites = find_sites(model)
    plain = spelled_out(json.loads(options), model)
    with peft_errors(f"PEFT can't apply its config to {base!r}"):
        # On the meta device: PEFT says where and how, and no number is made.
        adapted = get_peft_model(model, CONFIGS[kind](**plain, **UNINITIALISED[kind]))
    fused = getattr(adapted.peft_config[ADAPTER], "target_parameters", None)
    if fused:
        raise ExpertError(
            f"The adapter acts on layers of {base!r} that transformers 5 has fused into parameters "
            f"({', '.join(sorted(fused))}), which are no linear layers."
        )
    targets = {}
    for name, layer in adapted.get_base_model().named_modules():
        if not isinstance(layer, LoraLayer | IA3Layer):
            continue
        original = layer.get_base_layer()
        if name not in sites or not isinstance(original, nn.Linear | Conv1D):
            raise ExpertError(
                f"The adapter acts on {name} ({type(original).__name__}), but sites are linear "
                f"layers inside the blocks of {base!r}; embeddings and output layers are none."
            )
        targets[name] = _target(layer, sites[name])
    return Skeleton(adapted, targets)


def spelled_out(options: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """`options` of a PEFT config, checked already, with layers' names in place of patterns.

    Raises ExpertError when a pattern matches nothing, or PEFT would ignore an option beside it.
    """
    names = [name for name, _ in model.named_modules()]
    plain = dict(options)
    for key, value in options.items():
        if key.endswith(BY_PATTERN) and isinstance(value, Mapping):
            values = {name: value_at(value, name) for name in names}
            plain[key] = ByName({name: each for name, each in values.items() if each is not None})
        elif key in LISTS_OF_NAMES and isinstance(value, str) and value.lower() != ALL_LINEAR:
            # Matched here, without backtracking: a stranger's pattern could take PEFT hours.
            plain[key] = matching(value, names)
            if key == "target_modules" and not plain[key]:
                raise ExpertError(f"Its target_modules {shortened(value)} matches no layer.")
            if key == "target_modules" and options.get("layers_to_transform") is not None:
                raise ExpertError("layers_to_transform can't be used with a pattern of layers.")
    targets = plain.get("target_modules")
    if isinstance(options.get("feedforward_modules"), str) and isinstance(targets, list):
        # PEFT wants the one within the other.
        endings = tuple(f".{each}" for each in targets)
        inside = [name for name in names if f".{name}".endswith(endings)]
        plain["target_modules"] = sorted(inside)
        plain["feedforward_modules"] = [n for n in plain["feedforward_modules"] if n in inside]
    return plain


def _target(layer: LoraLayer | IA3Layer, site: Site) -> Target:
    n, d = site.in_features, site.out_features
    if isinstance(layer, IA3Layer):
        return Target({"vector": (1, n) if layer.is_feedforward else (d, 1)})
    rank = layer.r[ADAPTER]
    shapes: dict[str, tuple[int, ...]] = {"A": (rank, n), "B": (d, rank)}
    shapes |= {"bias": (d,)} if layer.lora_bias[ADAPTER] else {}
    return Target(shapes, float(layer.scaling[ADAPTER]))


@contextmanager
def peft_errors(what: str) -> Iterator[None]:
    """What PEFT raises inside becomes an ExpertError that begins with `what`."""
    try:
        with warnings.catch_warnings():
            # What PEFT warns of (fan_in_fan_out, tied layers) shows in the tensors, which are
            # compared.
            warnings.simplefilter("ignore")
            yield
    except Exception as error:  # odd values in a config make it raise anything
        raise ExpertError(f"{what}: {first_line(error)}.") from error
